"""Commands for data: prepare-data; and how inspect shows a dataset."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_olmo_bridge.data.progress import WORKERS, PrepareReporter

from .command import Outcome, register
from .completion import one_of
from .console import ProgressBar, human_bytes, say, table

if TYPE_CHECKING:
    from megatron_olmo_bridge.data.prepare import DataPlan

KIND = "Megatron indexed dataset"


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    register(app, "prepare-data", prepare_data, needs=("transformers",))


def prepare_data(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Files with documents, in order.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Prefix: OUT.bin, OUT.idx, OUT.json.")],
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR_OR_ID", help="A folder with a tokenizer, or a hub id.")
    ],
    workers: Annotated[
        int, typer.Option("--workers", "-j", min=1, help="Processes that tokenize.")
    ] = WORKERS,
    text_field: Annotated[
        str, typer.Option(help="Field (.jsonl) or column (.parquet) with the text.")
    ] = "text",
    txt_documents: Annotated[
        str,
        typer.Option(
            help="What is a document of .txt: each line, or each file.",
            autocompletion=one_of("line", "file"),
        ),
    ] = "line",
    token_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of .npy: uint16, uint32...; else the least for the vocabulary.",
            autocompletion=one_of("uint16", "uint32"),
        ),
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out what can't be read, and count it.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run; afresh if there is none.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, and write nothing.")
    ] = False,
) -> Outcome:
    """Tokenize text for training, into Megatron's indexed format.

    Reads .jsonl, .json and .txt (also with .gz or .zst), .parquet, and OLMo-core's .npy.

    Each document gets an eos. The output is the same for any number of workers.

    A compressed file goes to one worker; others are cut for all.

    Examples:
        olmo-bridge prepare-data corpus.jsonl data/train --tokenizer ./olmo2-1b
        olmo-bridge prepare-data part-*.json.gz train --tokenizer allenai/OLMo-2-0425-1B -j 16
        olmo-bridge prepare-data tokens.npy train --tokenizer ./olmo2-1b --token-dtype uint32
    """
    from megatron_olmo_bridge.data.prepare import plan_data
    from megatron_olmo_bridge.data.prepare import prepare_data as run

    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_field": text_field,
        "txt_documents": txt_documents,
        "token_dtype": token_dtype,
        "skip_bad_lines": skip_bad_lines,
        "resume": resume,
        "overwrite": overwrite,
    }
    if dry_run:
        return _show_plan(plan_data(inputs, out, **options))
    begin = time.monotonic()
    with _TokenBar() as bar:
        info = run(inputs, out, **options, workers=workers, reporter=bar)
    seconds = time.monotonic() - begin
    say(
        f"{info.prefix}: {info.documents:,} documents, {info.tokens:,} tokens ({info.dtype}) in "
        f"{seconds:.1f} s ({info.tokens / seconds:,.0f} tokens/s)"
    )
    if info.empty_documents:
        say(f"Left out: {info.empty_documents:,} documents without text.")
    if info.bad_lines:
        say(f"Left out: {info.bad_lines:,} bad lines. The first:")
        for line in info.first_bad_lines:
            say(f"  {line}")
    say(f"Look at it:  olmo-bridge inspect {info.prefix}")
    say(f"Train on it: data.path={info.prefix}")
    return Outcome(asdict(info) | {"seconds": seconds})


def _show_plan(plan: DataPlan) -> Outcome:
    size = sum(Path(file).stat().st_size for file in plan.files)
    say(
        f"{plan.partial.prefix}: {human_bytes(size)} in {len(plan.files)} file(s), as "
        f"{plan.writer.dtype} by {plan.tokenizer.name} (vocabulary of "
        f"{plan.tokenizer.vocab_size:,}). Nothing was written."
    )
    return Outcome(
        {
            "prefix": plan.partial.prefix,
            "inputs": plan.files,
            "bytes_read": size,
            "dtype": plan.writer.dtype,
            "tokenizer": plan.tokenizer.name,
            "vocab_size": plan.tokenizer.vocab_size,
        }
    )


class _TokenBar(ProgressBar, PrepareReporter):
    """Also shows how many tokens there are so far."""

    def tokens(self, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{count / 1e6:,.1f} M tokens")


def inspect_dataset(path: Path) -> Outcome:
    """Say what an indexed dataset is."""
    from megatron_olmo_bridge.data.info import describe

    found = describe(path)
    info = found.info
    unknown = "not recorded"
    largest = "" if info.max_token_id is None else f", largest that occurs {info.max_token_id:,}"
    rows = [
        ["what", KIND],
        ["documents", f"{info.documents:,}"],
        ["tokens", f"{info.tokens:,}"],
        ["tokens of a document", f"mean {found.mean:,.1f}, median {found.median:,.0f}, "
                                 f"longest {found.longest:,}"],
        ["dtype", info.dtype],
        ["size on disk", human_bytes(found.nbytes)],
        ["tokenizer", info.tokenizer or unknown],
        ["vocabulary", unknown if info.vocab_size is None else f"{info.vocab_size:,}{largest}"],
        ["eos", unknown if info.eos_id is None else str(info.eos_id)],
    ]  # fmt: skip
    if info.inputs:
        size = human_bytes(sum(file["bytes"] for file in info.inputs))
        rows.append(["prepared from", f"{size} in {len(info.inputs)} file(s)"])
        rows.append(
            [
                "left out",
                f"{info.bad_lines:,} bad lines, {info.empty_documents:,} documents without text",
            ]
        )
    rows.append(["begins with", " ".join(map(str, found.first_tokens[:12])) + " ..."])
    if found.first_text is not None:
        rows.append(["which is", repr(found.first_text)])
    table(["", ""], rows)
    for line in info.first_bad_lines:
        say(f"\nBad line: {line}")
    return Outcome({"kind": KIND} | asdict(found))
