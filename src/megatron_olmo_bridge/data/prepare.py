"""Tokenize input files in parallel, into one indexed dataset.

The input is divided into parts in a way that depends on the input alone. Each part is written by
itself (``parts.py``), and megatron-core's ``IndexedDatasetBuilder`` joins them in order. So the
output has the same bytes for any number of processes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import InputError, ProcessError
from megatron_olmo_bridge.formats.files import check_name
from megatron_olmo_bridge.storage.atomic import sync
from megatron_olmo_bridge.storage.identity import Identity, identity_digest

from .documents import Kind, Span, TextOptions, split_name, text_spans
from .info import DataInfo, read_info
from .options import PrepareOptions, PrepareReporter
from .partial import JOINED, OUTPUTS, Partial
from .parts import (
    TOKENIZER,
    Counts,
    Part,
    PartWriter,
    Progress,
    Worker,
    bad_line_error,
    write_json,
)
from .prefix import prefix_of
from .token_files import TOKEN_DTYPES, dtype_for, token_spans
from .tokenizer import TextTokenizer, load_tokenizer

PART_BYTES = 64 << 20
"""Upper limit of a part, where the input can be divided: about half a minute's work."""
LEAST_PART_BYTES = 1 << 20
PARTS = 256
"""Upper limit for the number of parts of a small input."""
_POLL = 0.3
"""Seconds between updates of the progress."""


def prepare_data(
    inputs: Sequence[str | Path],
    out: str | Path,
    options: PrepareOptions,
    reporter: PrepareReporter | None = None,
) -> DataInfo:
    """Tokenize documents into Megatron's indexed format: ``out``.bin, ``out``.idx, ``out``.json.

    Each document gets the ids of ``tokenizer(text, add_special_tokens=False)`` and one eos.
    Documents keep their order. One without any token is left out, and counted.

    Args:
        inputs: .jsonl (or .json with a JSON object in each line) and .txt, both also compressed as
            .gz or .zst; .parquet; .npy, which are OLMo-core's token files without a header.
        out: prefix of the output.
        options: the tokenizer, and how text is read. With more than one worker, a script must call
            this function under ``if __name__ == "__main__":``, because the processes import the
            script. Token files have the smallest dtype that holds the vocabulary, as in OLMo-core.
        reporter: receives progress, in bytes of input.

    Raises:
        InputError: an invalid file or option; no documents at all.
        FormatError: a damaged file; a bad line, unless they are skipped.
        OutputError: the output exists, can't be written, or the disk is full.
        ProcessError: a process died.
    """
    reporter = reporter or PrepareReporter()
    plan = plan_data(inputs, out, options)
    writer, partial = plan.writer, plan.partial
    with partial.opened():
        if not partial.finished:
            (writer.folder / TOKENIZER).write_text(plan.tokenizer.serialized)
            counts = _write_parts(plan.parts, writer, options.workers, reporter)
            total = _join(counts, writer, reporter)
            write_json(writer.folder / f"{JOINED}.json", plan.record | asdict(total))
            partial.commit()
    return read_info(partial.prefix)


@dataclass(frozen=True)
class DataPlan:
    """A checked run of which nothing is written yet."""

    files: list[str]
    tokenizer: TextTokenizer
    writer: PartWriter
    record: dict[str, Any]
    parts: list[Part]
    partial: Partial


def plan_data(inputs: Sequence[str | Path], out: str | Path, options: PrepareOptions) -> DataPlan:
    """Check everything that can be checked before a document is read.

    Arguments and errors are those of :func:`prepare_data`.
    """
    prefix = prefix_of(out)
    files = [str(path) for path in inputs]
    _check_option("txt_documents", options.txt_documents, ("line", "file"))
    _check_option("token_dtype", options.token_dtype, (None, *TOKEN_DTYPES))
    _check_paths(files, prefix)
    loaded = load_tokenizer(str(options.tokenizer))
    writer = PartWriter(
        folder=Path(f"{prefix}.partial"),
        eos_id=loaded.eos_id,
        vocab_size=loaded.vocab_size,
        dtype=np.dtype(_megatron().DType.optimal_dtype(loaded.vocab_size)).name,
        token_dtype=options.token_dtype or dtype_for(loaded.vocab_size),
        text=TextOptions(options.text_field, options.txt_documents),
        skip_bad_lines=options.skip_bad_lines,
    )
    record, plan = _record(files, writer, loaded)
    parts = _parts(files, writer)
    partial = Partial(prefix, plan, record, resume=options.resume, overwrite=options.overwrite)
    return DataPlan(files, loaded, writer, record, parts, partial)


def _check_option(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} {value!r}: must be one of {', '.join(filter(None, allowed))}")


def _check_paths(files: list[str], prefix: str) -> None:
    if not files:
        raise InputError("no input files")
    for file in files:
        path = Path(file)
        if not path.exists():
            raise InputError(f"{file}: no such file")
        if path.is_dir():
            raise InputError(f"{file}: is a folder. Name the files in it: {file}/*.jsonl.gz")
        if split_name(file)[0] is None:
            raise InputError(
                f"{file}: is of an unknown kind. Known are .jsonl, .json and .txt (also with .gz "
                "or .zst), .parquet, and .npy (OLMo-core's token files)."
            )
        if path.stat().st_size == 0:
            raise InputError(f"{file}: is empty")
    check_name(Path(prefix))
    if split_name(prefix)[0] is not None:
        raise InputError(
            f"{prefix}: is named last, as the output, but has the name of an input. The prefix of "
            "the output comes last."
        )
    if Path(prefix).is_dir():
        raise InputError(f"{prefix}: is a folder. Name a prefix in it: {prefix.rstrip('/')}/train")
    for output in (Path(prefix + suffix) for suffix in OUTPUTS):
        if output.resolve() in {Path(file).resolve() for file in files}:
            raise InputError(f"{output}: is both input and output. Name another output.")


def _megatron() -> Any:
    """Import megatron-core's indexed datasets without its warnings about missing packages."""
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _record(
    files: list[str], writer: PartWriter, tokenizer: TextTokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record for the output's .json, and the plan that a resumed run must match."""
    made = {
        "version": __version__,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": writer.dtype,
        "inputs": [{"path": file, "bytes": Path(file).stat().st_size} for file in files],
    }
    plan = made | asdict(writer.text) | {"token_dtype": writer.token_dtype}
    digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    state = identity_digest({Path(file): Identity.of(Path(file)) for file in files})
    return made | {"plan": digest, "input_state": state}, plan | {"input_state": state}


def _parts(files: list[str], writer: PartWriter) -> list[Part]:
    """Divide the input into parts of similar size; small files share one."""
    total = sum(Path(file).stat().st_size for file in files)
    limit = min(max(total // PARTS, LEAST_PART_BYTES), PART_BYTES)
    parts: list[list[Span]] = []
    room = 0
    for file in files:
        if split_name(file)[0] is Kind.TOKENS:
            spans = token_spans(file, limit, writer.token_dtype)
        else:
            spans = text_spans(file, limit, writer.text)
        for span in spans:
            if span.nbytes > room:
                parts.append([])
                room = limit
            parts[-1].append(span)
            room -= span.nbytes
    return [Part(number, tuple(spans)) for number, spans in enumerate(parts)]


def _write_parts(
    parts: list[Part], writer: PartWriter, workers: int, reporter: PrepareReporter
) -> dict[Part, Counts]:
    """Write the parts that are missing or damaged; return the counts of all, in order."""
    finished = {part: counts for part in parts if (counts := writer.finished(part))}
    missing = [part for part in parts if part not in finished]
    missing.sort(key=lambda part: -part.nbytes)  # a large one begun last would be waited for
    reporter.begin("Tokenizing", sum(part.nbytes for part in missing))
    tokens = sum(counts.tokens for counts in finished.values())

    def show(nbytes: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        reporter.advance(nbytes)
        reporter.tokens(tokens)

    processes = min(workers, len(missing))
    with _one_thread_each():
        if processes > 1:
            written = _write_in_processes(missing, writer, processes, show)
        else:
            written = {part: writer.write(part, show) for part in missing}
    reporter.end()
    all_counts = finished | written
    return {part: all_counts[part] for part in parts}


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep the tokenizers library from starting threads: the user chose the number of processes."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _write_in_processes(
    parts: list[Part], writer: PartWriter, workers: int, show: Progress
) -> dict[Part, Counts]:
    context = get_context("spawn")
    alive, end = context.Pipe(duplex=False)
    counters = context.Array("q", 2)
    shown = [0, 0]
    pool = ProcessPoolExecutor(workers, context, Worker.begin, (writer, counters, alive))
    try:
        futures = {part: pool.submit(Worker.write, part) for part in parts}
        pending = set(futures.values())
        while pending:
            done, pending = wait(pending, _POLL, FIRST_EXCEPTION)
            now = list(counters.get_obj())
            show(now[0] - shown[0], now[1] - shown[1])
            shown = now
            for future in done:
                future.result()
        return {part: future.result() for part, future in futures.items()}
    except BaseException as error:
        end.close()  # the workers end at once
        if _is_broken(error):
            raise ProcessError(
                "a process that tokenizes died: was it killed, for want of memory? Finished parts "
                "are kept: pass --resume, with fewer --workers. A script must call prepare_data "
                "under `if __name__ == '__main__':`."
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        end.close()


def _is_broken(error: BaseException) -> bool:
    """Return whether an error means that the pool lost a process."""
    if isinstance(error, BrokenProcessPool | BrokenPipeError):
        return True
    # While the pool starts processes or hands out work, it closes a pipe that is still in use:
    # "handle is closed", an OSError without an errno.
    return isinstance(error, OSError) and error.errno is None


def _join(parts: dict[Part, Counts], writer: PartWriter, reporter: PrepareReporter) -> Counts:
    """Write the parts as one dataset; return their counts together."""
    total = Counts()
    for counts in parts.values():
        total.add(counts)
    if total.bad_lines and not writer.skip_bad_lines:  # the run that is resumed skipped them
        raise bad_line_error(total.first_bad_lines[0])
    if not total.documents:
        raise InputError(
            f"no documents in the input: {total.bad_lines} bad lines, "
            f"{total.empty_documents} documents without text"
        )
    joined, dtype = str(writer.folder / JOINED), np.dtype(writer.dtype)
    reporter.begin("Joining", total.tokens * dtype.itemsize)
    builder = _megatron().IndexedDatasetBuilder(f"{joined}.bin", dtype=dtype.type)
    # add_index collects garbage for each part; unfrozen, torch's and transformers' objects would
    # add a tenth of a second each time.
    gc.freeze()
    try:
        with warnings.catch_warnings(action="ignore"):  # about ranks
            for part in (part for part, counts in parts.items() if counts.documents):
                builder.add_index(writer.prefix(part))
                reporter.advance(Path(f"{writer.prefix(part)}.bin").stat().st_size)
    finally:
        gc.unfreeze()
    builder.finalize(f"{joined}.idx")
    for suffix in (".bin", ".idx"):
        sync(Path(f"{joined}{suffix}"))
    reporter.end()
    return total
