"""Commands that write checkpoints: synth, import, export, average."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_olmo_bridge.checkpoints.hf_files import MAX_SHARD_SIZE
from megatron_olmo_bridge.convert.options import AverageOptions, ExportOptions, ImportOptions
from megatron_olmo_bridge.errors import BridgeError, InputError, OutputError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.remote_path import RemotePath
from megatron_olmo_bridge.storage.cloning import Clones
from megatron_olmo_bridge.storage.execute import WriteOptions, check_output
from megatron_olmo_bridge.storage.plan import CopyPlan

from .command import Outcome, register
from .completion import dtypes, sizes
from .console import ProgressBar, first_process, human_bytes, output, say, table
from .options import Omit

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
]
EXPECTED_RATE = 500e6
"""Bytes per second that --dry-run assumes: a mid-range SSD (docs/benchmarks.md)."""


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    register(app, "synth", synth)
    register(app, "import", import_)
    register(app, "export", export)
    register(app, "average", average)


def synth(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A size that `olmo-bridge models` lists.", autocompletion=sizes
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16.", autocompletion=dtypes)
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    layers: Annotated[int | None, typer.Option(help="Layers; default: as published.")] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Maximum bytes of tensors in a file: 5GB, 500MB.")
    ] = MAX_SHARD_SIZE,
) -> Outcome:
    """Create a Hugging Face checkpoint with random weights in a published architecture.

    Weights are streamed to disk, so a model of any size needs little memory. transformers loads it.

    Examples:
        olmo-bridge synth olmo2-tiny ./tiny
        olmo-bridge synth olmo2-1b ./olmo2-1b --dtype float32
    """
    from megatron_olmo_bridge.tools.synth import synth as run

    with ProgressBar() as bar:
        made = run(
            name, folder, dtype=dtype, seed=seed, layers=layers, max_shard_size=max_shard_size,
            reporter=bar,
        )  # fmt: skip
    size, dtype = _size(made), parse_dtype(dtype)
    say(f"{made}: {name} with random weights, {dtype}, {human_bytes(size)}")
    return Outcome({"destination": made, "name": name, "dtype": dtype, "bytes_written": size})


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A folder, a hub id, an address, OLMo-core's stepN, or OLM's step_N.pt.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Checkpoint root to create.")],
    *,
    options: ImportOptions,
    write: WriteOptions,
    dry_run: DryRun = False,
) -> Outcome:
    """Write a Hugging Face checkpoint as a Megatron checkpoint (torch_dist).

    Stock Megatron loads it at any parallel layout. Needs no GPU and little memory.

    Examples:
        olmo-bridge import allenai/OLMo-2-0425-1B ./megatron
        olmo-bridge import ./hf ./megatron --dtype bfloat16 --workers 2
        olmo-bridge import ./peteish32/step1000 ./megatron --optimizer
        olmo-bridge import ./checkpoints/step_100.pt ./megatron --heads 4
    """
    from megatron_olmo_bridge.checkpoints.megatron_config import HF_SUBFOLDER
    from megatron_olmo_bridge.convert import to_megatron
    from megatron_olmo_bridge.formats.hf_folder import read_config
    from megatron_olmo_bridge.models.families import bridge_for

    if output.silent:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # hide the bar of the download
    if dry_run:
        plan, _ = to_megatron.plan_import(source, options)
        return _dry_run([(plan, destination)], write)
    begin = time.monotonic()
    with ProgressBar() as bar:
        plan = to_megatron.import_checkpoint(source, destination, options, write, bar)
    result = _show_done([plan], destination, write, begin)
    if not output.silent:
        if options.dtype == "keep" and not (
            options.revision or options.num_labels or options.hf_config
        ):
            option = "".join(f" --{name} {value}" for name, value in options.kind_options.items())
            option += " --optimizer" * options.optimizer
            is_path = options.iteration is None and not isinstance(plan.source, RemotePath)
            path = source if is_path else plan.source
            say(f"Prove it:    olmo-bridge verify {path} {destination}{option}")
        if rows := options.num_labels:
            say(f"The head is new: score.weight, {rows} rows of zeros. Train it before use.")
        for note in plan.notes:
            say(f"Note: {note}.")
        bridge = bridge_for(read_config(destination / plan.weights_folder / HF_SUBFOLDER), "")
        if bridge.megatron_lm_flags("float32"):
            say(f"Megatron-LM: olmo-bridge inspect {destination} --megatron-args")
    return Outcome(result)


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A checkpoint root, an iter_ folder, or another checkpoint; or its address.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create.")],
    *,
    options: Annotated[ExportOptions, Omit("num_labels")],
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload DST, with a model card.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="If the hub repository is new, make it private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Hub branch to push to; created if missing.")
    ] = None,
    write: WriteOptions,
    dry_run: DryRun = False,
) -> Outcome:
    """Write a checkpoint as a Hugging Face one, as save_pretrained writes it, or as OLMo-core's.

    Reads what this tool, megatron-core, Megatron-LM or Megatron-Bridge saved, at any parallel
    layout, with or without optimizer state.

    Examples:
        olmo-bridge export ./megatron ./hf
        olmo-bridge export ./run ./hf --iteration all --hf-config ./olmo2-1b
        olmo-bridge export ./checkpoints/step_100.pt ./hf --heads 4
        olmo-bridge export ./run ./hf --push-to-hub me/my-olmo --private
        olmo-bridge export ./run ./step2000 --to olmo-core --optimizer
    """
    from megatron_olmo_bridge.convert import to_hf

    if output.silent:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # hide the bar of the upload
    _check_push(push_to_hub, private, revision, options.iteration)
    if dry_run:
        exports = to_hf.plan_exports(source, destination, options)
        planned = [(plan, folder) for plan, _, folder in exports.plans]
        outcome = _dry_run(planned, write)
        exports.check_all_planned("as above")
        return outcome
    begin = time.monotonic()
    with ProgressBar() as bar:
        plans = to_hf.export_checkpoint(source, destination, options, write, bar)
    url = None
    if push_to_hub is not None and first_process():
        url = _push(destination, push_to_hub, private, revision)
    result = _show_done(plans, destination, write, begin)
    for plan in plans:
        say(f"Exported:    {plan.source}")
    if url is not None:
        say(f"On the hub:  {url}")
    return Outcome(result | {"url": url, "sources": [plan.source for plan in plans]})


def _check_push(
    repo: str | None, private: bool, revision: str | None, iteration: int | str | None
) -> None:
    """Refuse, before a long export, what would fail when it is pushed."""
    from megatron_olmo_bridge.storage.hub import check_can_push

    if repo is not None:
        if iteration == "all":
            raise InputError("--push-to-hub uploads a single model: choose one --iteration")
        check_can_push(repo)
    elif private or revision is not None:
        raise InputError("--private and --revision need --push-to-hub")


def _push(folder: Path, repo: str, private: bool, revision: str | None) -> str:
    from megatron_olmo_bridge.storage.hub import push_to_hub
    from megatron_olmo_bridge.tools.model_card import write_model_card

    write_model_card(folder, name=repo)
    try:
        return push_to_hub(folder, repo, private=private, revision=revision)
    except BridgeError as error:
        raise OutputError(
            f"{error}.\nThe export itself is complete: {folder}. To push it, run the same command "
            "with --resume, which does not write the files again."
        ) from error


def average(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...", help="Folders of any kind, iter_ folders, hub ids, addresses."
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create.")],
    *,
    options: AverageOptions,
    write: WriteOptions,
    dry_run: DryRun = False,
) -> Outcome:
    """Average the weights of several checkpoints of one model ("souping").

    DST is a Hugging Face folder, with the config and tokenizer of A.

    Examples:
        olmo-bridge average ./seed1 ./seed2 ./soup --weights 1,2
        olmo-bridge average ./run/iter_0001000 ./run/iter_0002000 ./soup
    """
    from megatron_olmo_bridge.convert.average import average_checkpoints, plan_average

    if dry_run:
        plan, _ = plan_average(sources, destination, options)
        return _dry_run([(plan, destination)], write)
    begin = time.monotonic()
    with ProgressBar() as bar:
        plan = average_checkpoints(sources, destination, options, write, bar)
    return Outcome(_show_done([plan], destination, write, begin))


def _summary(plan: CopyPlan, destination: Path, clones: Clones) -> dict[str, Any]:
    cloned = clones.nbytes(plan.files)
    return {
        "operation": plan.operation,
        "source": str(plan.source),
        "destination": str(destination),
        "tensors": sum(1 for _ in plan.payloads),
        "bytes_read": plan.source_bytes,
        "bytes_written": plan.output_bytes,
        "bytes_cloned": cloned,
        "disk_free": shutil.disk_usage(_existing(destination)).free,
        "expected_seconds": round(
            ((plan.source_bytes + plan.output_bytes) / 2 - cloned) / EXPECTED_RATE, 1
        ),
        "plan_sha256": plan.digest,
        "files": {f.name: f.size for f in plan.files} | {n: len(d) for n, d in plan.texts.items()},
    }


def _dry_run(planned: list[tuple[CopyPlan, Path]], write: WriteOptions) -> Outcome:
    """Print what would be written, or raise what the run would: one plan per iteration."""
    plans = [_summary(plan, folder, check_output(plan, folder, write)) for plan, folder in planned]
    for summary in plans:
        table(["file", "bytes"], [[n, f"{b:,}"] for n, b in summary["files"].items()])
        written, cloned = summary["bytes_written"], summary["bytes_cloned"]
        say(
            f"{summary['operation']} of {summary['tensors']} tensors: reads "
            f"{human_bytes(summary['bytes_read'])}, writes {human_bytes(written)}"
            f"{_cloned(cloned, written)}; {human_bytes(summary['disk_free'])} are free. Expect "
            f"about {summary['expected_seconds']} s at {EXPECTED_RATE / 1e6:.0f} MB/s. "
            "Nothing was written."
        )
    return Outcome({"plans": plans})


def _show_done(
    plans: list[CopyPlan], destination: Path, write: WriteOptions, begin: float
) -> dict[str, Any]:
    """Print what was written."""
    seconds = time.monotonic() - begin
    written = sum(p.output_bytes for p in plans)
    folder = _existing(destination)
    cloned = sum(Clones.of(p, folder, write.reflink).nbytes(p.files) for p in plans)
    count = sum(1 for plan in plans for _ in plan.payloads)
    rate = human_bytes(written / max(seconds, 1e-9))
    say(
        f"{destination}: {count} tensors, {human_bytes(written)} in {seconds:.1f} s ({rate}/s)"
        f"{_cloned(cloned, written)}"
    )
    return {
        "destination": destination, "bytes_written": written, "bytes_cloned": cloned,
        "seconds": seconds, "plan_sha256": [p.digest for p in plans],
    }  # fmt: skip


def _existing(destination: Path) -> Path:
    return next(p for p in (destination, *destination.absolute().parents) if p.exists())


def _cloned(cloned: int, written: int) -> str:
    """Return how much of an output shares blocks with its source, if any does."""
    if not cloned:
        return ""
    return f", {human_bytes(cloned)} cloned and {human_bytes(written - cloned)} copied"


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
