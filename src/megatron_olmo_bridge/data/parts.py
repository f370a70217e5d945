"""The work of one process: spans of input files into one small indexed dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.files import read_json
from megatron_olmo_bridge.storage.atomic import replace_file, sync
from megatron_olmo_bridge.storage.execute import sha256

from .documents import Batch, Kind, Span, TextOptions, read_texts, split_name
from .indexed import write_index
from .token_files import LONGEST_DOCUMENT, read_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
BAD_LINES_NAMED = 5
"""Bad lines that are named; all are counted."""

Progress = Callable[[int, int], None]
"""Told how many bytes were read and how many tokens written since last time."""


@dataclass(frozen=True)
class Part:
    """A share of the work, and its place in the output."""

    number: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


@dataclass
class Counts:
    """What a part, or all, of the input held."""

    documents: int = 0
    tokens: int = 0
    max_token_id: int = -1
    empty_documents: int = 0
    """Documents without a token, which are left out."""
    bad_lines: int = 0
    first_bad_lines: list[str] = field(default_factory=list)
    """``file:line: why``, the first few."""

    def add(self, other: Counts) -> None:
        """Count another part, which comes after this one."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.max_token_id = max(self.max_token_id, other.max_token_id)
        self.empty_documents += other.empty_documents
        self.bad_lines += other.bad_lines
        named = self.first_bad_lines + other.first_bad_lines
        self.first_bad_lines = named[:BAD_LINES_NAMED]


@dataclass(frozen=True)
class PartWriter:
    """All that a process must know to write parts."""

    folder: Path
    """Of the parts; has the tokenizer too."""
    eos_id: int
    vocab_size: int
    dtype: str
    """Of the output."""
    token_dtype: str
    """Of token files."""
    text: TextOptions
    skip_bad_lines: bool

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read from the folder in each process. Sent to one that is being started, it would fill
        the pipe, and should that process die then, Python 3.11 would wait for ever."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / TOKENIZER))

    def prefix(self, part: Part) -> str:
        """Of the part's files."""
        return str(self.folder / f"part-{part.number:06d}")

    def finished(self, part: Part) -> Counts | None:
        """What a part that is written held; None if it is not."""
        record = self._record(part)
        return None if record is None else record[0]

    def is_sound(self, part: Part) -> bool:
        """Whether a part's files are there and as they were written."""
        record = self._record(part)
        try:
            return record is not None and record[1] == self._checksums(part)
        except FileNotFoundError:
            return False

    def _record(self, part: Part) -> tuple[Counts, dict[str, str]] | None:
        file = Path(f"{self.prefix(part)}.json")
        try:
            record = read_json(file)
            return Counts(**record["counts"]), record["sha256"]
        except FileNotFoundError:
            return None
        except (KeyError, TypeError) as error:
            raise FormatError(f"{file}: is damaged. Pass --overwrite to start afresh.") from error

    def _checksums(self, part: Part) -> dict[str, str]:
        return {suffix: sha256(Path(self.prefix(part) + suffix)) for suffix in (".bin", ".idx")}

    def write(self, part: Part, progress: Progress) -> None:
        """Write a part: .bin and .idx, and last a .json that makes it finished."""
        prefix, dtype = self.prefix(part), np.dtype(self.dtype)
        counts, lengths = Counts(), [np.empty(0, np.int64)]
        with Path(f"{prefix}.bin").open("wb") as out:
            for documents in self._documents(part, counts):
                ids, ends, nbytes = documents
                if len(ids):
                    out.write(ids.astype(dtype).tobytes())
                    counts.max_token_id = max(counts.max_token_id, int(ids.max()))
                lengths.append(ends)
                counts.tokens += len(ids)
                progress(nbytes, len(ids))
        every = np.concatenate(lengths)
        counts.documents = len(every)
        if counts.documents and every.max() > LONGEST_DOCUMENT:
            files = ", ".join(sorted({span.path for span in part.spans}))
            raise InputError(
                f"{files}: a document of {every.max():,} tokens; {LONGEST_DOCUMENT:,} are possible"
            )
        write_index(Path(f"{prefix}.idx"), every.astype(np.int32), dtype)
        for suffix in (".bin", ".idx"):
            sync(Path(f"{prefix}{suffix}"))
        record = {"counts": asdict(counts), "sha256": self._checksums(part)}
        write_json(Path(f"{prefix}.json"), record)

    def _documents(
        self, part: Part, counts: Counts
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], int]]:
        """Ids, lengths of the documents that end with them, bytes that were read for them."""
        for span in part.spans:
            if split_name(span.path)[0] is Kind.TOKENS:
                for ids, lengths, empty, nbytes in read_tokens(
                    span, self.token_dtype, self.eos_id, self.vocab_size
                ):
                    counts.empty_documents += empty
                    yield ids, lengths, nbytes
            else:
                for batch in read_texts(span, self.text):
                    self._note_bad_lines(batch, counts)
                    yield *self._tokenize(batch.texts, counts), batch.nbytes

    def _note_bad_lines(self, batch: Batch, counts: Counts) -> None:
        if batch.bad and not self.skip_bad_lines:
            raise bad_line_error(str(batch.bad[0]))
        named = [str(line) for line in batch.bad[:BAD_LINES_NAMED]]
        counts.add(Counts(bad_lines=len(batch.bad), first_bad_lines=named))

    def _tokenize(
        self, texts: list[str], counts: Counts
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        documents = [ids for e in encoded if (ids := e.ids)]
        counts.empty_documents += len(texts) - len(documents)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
        ended = chain.from_iterable((*ids, self.eos_id) for ids in documents)
        return np.fromiter(ended, np.int64, int(lengths.sum())), lengths


def bad_line_error(line: str) -> FormatError:
    """What is raised unless bad lines are to be skipped."""
    return FormatError(
        f"{line}. Mend it; or pass --skip-bad-lines to leave such lines out, counted and named "
        "(with --resume, if some parts are finished already)."
    )


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON into a file that is there whole or not at all, and durable."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


# ------------------------------------------------------------------------------ in a worker process


class Worker:
    """A process that writes parts, as long as the one that started it lives."""

    _writer: PartWriter
    _counters: Any

    @classmethod
    def begin(cls, writer: PartWriter, counters: Any, alive: Connection) -> None:
        """Called once in a process.

        Args:
            counters: bytes and tokens of all workers, shared.
            alive: closed at the other end, also by the death of the process there, this one ends.
        """
        import signal
        import threading

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started this one sees to it
        cls._writer, cls._counters = writer, counters

        def end_with_parent() -> None:
            alive.poll(None)
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()

    @classmethod
    def write(cls, part: Part) -> None:
        """Write a part."""
        cls._writer.write(part, cls._progress)

    @classmethod
    def _progress(cls, nbytes: int, tokens: int) -> None:
        with cls._counters.get_lock():
            cls._counters[0] += nbytes
            cls._counters[1] += tokens
