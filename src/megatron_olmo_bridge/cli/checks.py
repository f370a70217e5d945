"""Read-only commands: verify, fingerprint, inspect, models, doctor."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.storage.plan import WORKERS
from megatron_olmo_bridge.tools.against import ExpectedWeights

from .command import DIFFERENT, Outcome, register
from .console import ProgressBar, Workers, human_bytes, say, table
from .data import inspect_dataset
from .options import Omit

if TYPE_CHECKING:
    from megatron_olmo_bridge.checkpoints.differences import Difference
    from megatron_olmo_bridge.tools.inspect import Inspection
    from megatron_olmo_bridge.tools.verify import Verification

SHOWN = 40
"""Maximum number of differences in the table; --json lists all."""


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    register(app, "verify", verify, exit_codes=DIFFERENT)
    register(app, "fingerprint", fingerprint)
    register(app, "inspect", inspect)
    register(app, "models", models)
    register(app, "doctor", doctor)


def verify(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint of any kind, an address, or a hub id.")
    ],
    second: Annotated[
        str | None, typer.Argument(metavar="[B]", help="Checkpoint to compare A with.")
    ] = None,
    *,
    options: Annotated[ReadOptions, Omit("iteration", "num_labels")],
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Compare the optimizer state too.")
    ] = False,
    expected: ExpectedWeights,
    workers: Workers = WORKERS,
) -> Outcome:
    """Prove that two checkpoints hold the same model: bit for bit, no tolerance.

    Names, shapes, dtypes, values and config are compared in both directions. With one path, its
    files are compared with the record made when they were written; or its weights with a
    fingerprint (--fingerprint), or with the hashes of its blocks (--against). Exits with 1 if
    anything differs.

    Examples:
        olmo-bridge verify ./hf ./megatron
        olmo-bridge verify ./megatron
        olmo-bridge verify ./checkpoints/step_100.pt ./megatron --heads 4
        olmo-bridge verify ./megatron --against leaves.json --sample 100
    """
    result: Verification
    with ProgressBar() as bar:
        if expected.is_given:
            from megatron_olmo_bridge.tools.against import verify_against

            if second is not None or optimizer:
                raise InputError(
                    "--fingerprint and --against take one checkpoint, and compare its weights alone"
                )
            result = verify_against(first, expected, options, workers=workers, reporter=bar)
        else:
            from megatron_olmo_bridge.tools.verify import verify as run

            result = run(first, second, options, optimizer=optimizer, workers=workers, reporter=bar)
    _print_differences(result.differences)
    for note in result.notes:
        say(f"Note: {note}")
    size = human_bytes(result.nbytes)
    compared = {
        "tensors": f"{result.compared} tensors, {size} compared bit for bit",
        "fingerprint": f"{result.compared} tensors, {size} compared with the fingerprint",
        "blocks": f"{result.compared} blocks, {size} compared with their hashes",
    }.get(result.checked, f"{result.compared} files compared with the record")
    if result.equal:
        verdict = "Sizes only, no difference" if result.checked == "sizes" else "Equal"
        say(f"{verdict}: {compared}.")
    else:
        say(f"NOT equal: {len(result.differences)} difference(s). {compared}.")
    if sample := getattr(result, "sample", None):
        say(
            f"A sample of {sample.blocks} of {sample.total} blocks, with --seed {sample.seed}: it "
            f"finds a single changed block with a probability of "
            f"{sample.finds_one_changed * 100:.2f} %, "
            f"and {sample.changed_for_99_percent} or more with 99 %."
        )
    return Outcome({"equal": result.equal} | asdict(result), exit_code=0 if result.equal else 1)


def _print_differences(differences: list[Difference]) -> None:
    if differences:
        rows = [[d.kind, d.name, d.detail] for d in differences[:SHOWN]]
        table(["differs", "name", "how"], rows)
        if len(differences) > SHOWN:
            say(f"... and {len(differences) - SHOWN} more; --json lists all.")


def fingerprint(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint of any kind, or a hub id.")
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with its hash.")
    ] = False,
    leaves: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the hashes of all blocks, for verify --against."),
    ] = None,
    *,
    options: Annotated[ReadOptions, Omit("num_labels")],
    workers: Workers = WORKERS,
) -> Outcome:
    """Print a hash of a model's weights that is the same in every format.

    A Hugging Face folder in any shards, a Megatron checkpoint at any layout, with or without
    optimizer state, and one of OLMo-core have the same fingerprint if their weights have the same
    names, dtypes, shapes and bits. So a fingerprint published with a model proves any copy of it.
    docs/fingerprint.md specifies it.

    Examples:
        olmo-bridge fingerprint ./megatron
        olmo-bridge fingerprint allenai/OLMo-2-0425-1B --leaves leaves.json
        olmo-bridge verify ./megatron --fingerprint 78bb43da...
    """
    from megatron_olmo_bridge.tools.fingerprint import check_leaves_file, write_leaves
    from megatron_olmo_bridge.tools.fingerprint import fingerprint as run

    check_leaves_file(leaves)
    with ProgressBar() as bar:
        result = run(path, options, workers=workers, reporter=bar)
    if leaves is not None:
        write_leaves(leaves, result)
    rows = [(t.name, t.dtype, list(t.shape), t.hash.hex()) for t in result.tensors]
    if tensors:
        table(["tensor", "dtype", "shape", "hash"], [[*map(str, row)] for row in rows])
        say("")
    count, blocks, nbytes = len(result.tensors), result.block_count, result.nbytes
    say(f"{result.root}  {path}: {count} tensors, {blocks} blocks, {human_bytes(nbytes)}")
    summary = {"fingerprint": result.root, "blocks": blocks, "nbytes": nbytes, "leaves": leaves}
    if tensors:  # long, so only on request
        keys = ("name", "dtype", "shape", "hash")
        summary["tensors"] = [dict(zip(keys, row, strict=True)) for row in rows]
    return Outcome(summary)


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A checkpoint of any kind, an address, a hub id, or prepared data."
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    mapping: Annotated[
        bool, typer.Option("--mapping", help="Show where each Hugging Face block is stored.")
    ] = False,
    megatron_args: Annotated[
        bool, typer.Option("--megatron-args", help="Print Megatron-LM's flags, ready to paste.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with diagrams of the mapping.")
    ] = None,
    *,
    options: Annotated[ReadOptions, Omit("num_labels")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> Outcome:
    """Describe a checkpoint: model, size, dtype, files, layout and origin.

    Only headers are read, and nothing in them is executed. For prepared data (the prefix of a .bin
    and an .idx), print the number of documents and tokens, and the first few tokens.

    Examples:
        olmo-bridge inspect ./megatron
        olmo-bridge inspect ./megatron --megatron-args
        olmo-bridge inspect ./hf --json --tensors
        olmo-bridge inspect ./hf --html mapping.html
    """
    from megatron_olmo_bridge.checkpoints.open import open_checkpoint
    from megatron_olmo_bridge.data.prefix import is_indexed
    from megatron_olmo_bridge.storage.hub import locate
    from megatron_olmo_bridge.tools.inspect import describe

    from .mapping_page import mapping_page
    from .pages import check_page, write_page

    if is_indexed(path):
        return inspect_dataset(Path(path))
    check_page(html)
    checkpoint = open_checkpoint(locate(path, revision, options.max_connections), options)
    inspection = describe(checkpoint)
    if html is not None:
        write_page(html, mapping_page(checkpoint))
    result = asdict(inspection)
    for name, wanted in (("tensors", tensors), ("mapping", mapping)):
        if not wanted:  # long, so only on request
            del result[name]
    if megatron_args:
        if not inspection.megatron_flags:
            raise InputError(
                f"Megatron-LM's command line can't express {inspection.family}; build the model "
                "with its provider, as examples/load_and_save.py does"
            )
        say(shlex.join(inspection.megatron_flags))
        return Outcome(result)
    _print_summary(inspection)
    if tensors:
        say("")
        rows = [
            [t["name"], str(t["shape"]), t["dtype"], str(t["pieces"])] for t in inspection.tensors
        ]
        table(["tensor", "shape", "dtype", "chunks"], rows)
    if mapping:
        say("")
        rows = [[r["megatron"], r["block"], r["hf"], r["hf_block"]] for r in inspection.mapping]
        table(["Megatron parameter", "block", "Hugging Face tensor", "block"], rows)
    return Outcome(result)


def _print_summary(inspection: Inspection) -> None:
    padded = f", padded to {inspection.padded_vocab_size}"
    rows = [
        ["what", f"{inspection.kind}, {inspection.layout}"],
        ["model", f"{inspection.family}, {inspection.size or 'no published size'}"],
        ["parameters", f"{inspection.parameters:,}"],
        ["dtype", ", ".join(inspection.dtypes)],
        ["vocabulary", f"{inspection.vocab_size}"],
        ["size on disk", f"{human_bytes(inspection.nbytes)} in {len(inspection.files)} files"],
        ["folder", inspection.folder],
        ["config from", inspection.config_from],
    ]
    if inspection.padded_vocab_size != inspection.vocab_size:
        rows[4][1] += padded
    if inspection.iterations:
        rows.append(["iterations", ", ".join(inspection.iterations)])
    if inspection.provenance:
        origin = inspection.provenance["source"]
        commit = inspection.provenance.get("revision")
        rows.append(["made from", f"{origin} at {commit}" if commit else origin])
        if recorded := inspection.provenance.get("fingerprint"):
            rows.append(["fingerprint", f"{recorded}, when it was written"])
    table(["", ""], rows)
    say("")
    table(["number", "value"], [[k, str(v)] for k, v in inspection.numbers.items()])
    for note in inspection.notes:
        say(f"\nNote: {note}.")


def models(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
) -> Outcome:
    """List the supported models: families, architectures, sizes, parallel layouts."""
    from megatron_olmo_bridge.models import catalogue

    families = catalogue.catalogue()
    if markdown:
        say(catalogue.markdown().rstrip())
        return Outcome(families)
    for family in families:
        say(f"{family.family}: {', '.join(family.architectures)}")
        sizes = [[name, f"{count:,}"] for name, count in family.sizes.items()]
        table(["size", "parameters"], sizes)
        say(f"Compared with transformers at {family.layouts}; {family.verified}.\n")
    return Outcome(families)


def doctor() -> Outcome:
    """Show what is installed, and which commands work with it."""
    from megatron_olmo_bridge.tools.doctor import doctor as run

    findings = run()
    rows = [["yes" if f.works else "no", f.what, f.found, f.means] for f in findings]
    table(["works", "what", "found", "means"], rows)
    return Outcome(findings)
