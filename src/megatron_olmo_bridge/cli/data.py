"""The prepare-data command, and how inspect shows a dataset."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_olmo_bridge.data.options import PrepareOptions, PrepareReporter

from .command import Outcome, register
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
    *,
    options: PrepareOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, write nothing.")
    ] = False,
) -> Outcome:
    """Tokenize text for training, into Megatron's indexed format.

    Reads .jsonl, .json and .txt (also with .gz or .zst), .parquet, and OLMo-core's .npy.

    Each document ends with an eos token. The output is the same for any number of workers.

    A compressed file is read by one worker; other files are split over all workers.

    Examples:
        olmo-bridge prepare-data corpus.jsonl data/train --tokenizer ./olmo2-1b
        olmo-bridge prepare-data part-*.json.gz train --tokenizer allenai/OLMo-2-0425-1B -j 16
        olmo-bridge prepare-data tokens.npy train --tokenizer ./olmo2-1b --token-dtype uint32
    """
    from megatron_olmo_bridge.data.prepare import plan_data
    from megatron_olmo_bridge.data.prepare import prepare_data as run

    if dry_run:
        return _show_plan(plan_data(inputs, out, options))
    begin = time.monotonic()
    with _TokenBar() as bar:
        info = run(inputs, out, options, bar)
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
    """Progress bar that also shows the number of tokens so far."""

    def tokens(self, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{count / 1e6:,.1f} M tokens")


def inspect_dataset(path: Path) -> Outcome:
    """Describe an indexed dataset."""
    from megatron_olmo_bridge.data.info import describe

    description = describe(path)
    info = description.info
    unknown = "not recorded"
    largest = "" if info.max_token_id is None else f", largest that occurs {info.max_token_id:,}"
    rows = [
        ["what", KIND],
        ["documents", f"{info.documents:,}"],
        ["tokens", f"{info.tokens:,}"],
        ["tokens of a document", f"mean {description.mean:,.1f}, median {description.median:,.0f}, "
                                 f"longest {description.longest:,}"],
        ["dtype", info.dtype],
        ["size on disk", human_bytes(description.nbytes)],
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
    rows.append(["begins with", " ".join(map(str, description.first_tokens[:12])) + " ..."])
    if description.first_text is not None:
        rows.append(["which is", repr(description.first_text)])
    table(["", ""], rows)
    for line in info.first_bad_lines:
        say(f"\nBad line: {line}")
    return Outcome({"kind": KIND} | asdict(description))
