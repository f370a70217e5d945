"""Write a part of a dataset: the documents of some spans, as a small indexed dataset."""

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

from .documents import Kind, Span, TextOptions, read_texts, split_name
from .indexed import write_index
from .token_files import LONGEST_DOCUMENT, read_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
BAD_LINES_NAMED = 5
"""Bad lines that are quoted with their reason; all are counted."""

Progress = Callable[[int, int], None]
"""Called with the bytes read and the tokens written since the last call."""


@dataclass(frozen=True)
class Part:
    """Spans of the input that are tokenized together; ``number`` is the part's place."""

    number: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


@dataclass
class Counts:
    """Numbers of documents, tokens and bad lines in a part of the input or in all of it."""

    documents: int = 0
    tokens: int = 0
    max_token_id: int = -1
    empty_documents: int = 0
    """Documents without a token, which are left out."""
    bad_lines: int = 0
    first_bad_lines: list[str] = field(default_factory=list)
    """The first few, as ``file:line: why``."""

    def add(self, other: Counts) -> None:
        """Add the counts of what comes next in the input."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.max_token_id = max(self.max_token_id, other.max_token_id)
        self.empty_documents += other.empty_documents
        self.bad_lines += other.bad_lines
        named = self.first_bad_lines + other.first_bad_lines
        self.first_bad_lines = named[:BAD_LINES_NAMED]


@dataclass(frozen=True)
class PartWriter:
    """Tokenizes parts; holds everything that a process needs for it."""

    folder: Path
    """Holds the parts, and the tokenizer."""
    eos_id: int
    vocab_size: int
    dtype: str
    """Dtype of the output's token ids."""
    token_dtype: str
    """Dtype of token files in the input."""
    text: TextOptions
    skip_bad_lines: bool

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read from the folder once in each process."""
        from tokenizers import Tokenizer

        # It is not sent to a starting process: it would fill the pipe, and if the process died
        # then, Python 3.11 would wait forever.
        return Tokenizer.from_file(str(self.folder / TOKENIZER))

    def prefix(self, part: Part) -> str:
        """Return the path of a part's files without their suffix."""
        return str(self.folder / f"part-{part.number:06d}")

    def finished(self, part: Part) -> Counts | None:
        """Return the counts of a finished part; None if its files are missing or damaged.

        Raises:
            FormatError: its record is damaged.
        """
        file = Path(f"{self.prefix(part)}.json")
        try:
            record = read_json(file)
            counts, checksums = Counts(**record["counts"]), record["sha256"]
            return counts if checksums == self._checksums(part) else None
        except FileNotFoundError:
            return None
        except (KeyError, TypeError) as error:
            raise FormatError(f"{file}: is damaged. Pass --overwrite to start afresh.") from error

    def _checksums(self, part: Part) -> dict[str, str]:
        return {suffix: sha256(Path(self.prefix(part) + suffix)) for suffix in (".bin", ".idx")}

    def write(self, part: Part, progress: Progress) -> Counts:
        """Write a part's .bin and .idx, and then the .json that marks it finished.

        Raises:
            InputError: a document is too long.
            FormatError: a bad line, unless they are skipped.
        """
        prefix, dtype = self.prefix(part), np.dtype(self.dtype)
        counts, lengths = Counts(), [np.empty(0, np.int64)]
        blocks = (block for span in part.spans for block in self._blocks(span, counts))
        with Path(f"{prefix}.bin").open("wb") as out:
            for ids, document_lengths, empty_documents, nbytes in blocks:
                if len(ids):
                    out.write(ids.astype(dtype).tobytes())
                    counts.max_token_id = max(counts.max_token_id, int(ids.max()))
                counts.tokens += len(ids)
                counts.empty_documents += empty_documents
                lengths.append(document_lengths)
                progress(nbytes, len(ids))
        every = np.concatenate(lengths)
        counts.documents = len(every)
        if every.max(initial=0) > LONGEST_DOCUMENT:
            files = ", ".join(sorted({span.path for span in part.spans}))
            raise InputError(
                f"{files}: a document of {every.max():,} tokens; {LONGEST_DOCUMENT:,} are possible"
            )
        write_index(Path(f"{prefix}.idx"), every.astype(np.int32), dtype)
        for suffix in (".bin", ".idx"):
            sync(Path(f"{prefix}{suffix}"))
        record = {"counts": asdict(counts), "sha256": self._checksums(part)}
        write_json(Path(f"{prefix}.json"), record)
        return counts

    def _blocks(
        self, span: Span, counts: Counts
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], int, int]]:
        """Yield the documents of a span as :func:`read_tokens` does; count the bad lines."""
        if split_name(span.path)[0] is Kind.TOKENS:
            yield from read_tokens(span, self.token_dtype, self.eos_id, self.vocab_size)
            return
        for batch in read_texts(span, self.text):
            if batch.bad and not self.skip_bad_lines:
                raise bad_line_error(str(batch.bad[0]))
            named = [str(line) for line in batch.bad[:BAD_LINES_NAMED]]
            counts.add(Counts(bad_lines=len(batch.bad), first_bad_lines=named))
            ids, lengths = self._tokenize(batch.texts)
            yield ids, lengths, len(batch.texts) - len(lengths), batch.nbytes

    def _tokenize(self, texts: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        documents = [ids for e in encoded if (ids := e.ids)]
        lengths = np.fromiter(map(len, documents), np.int64, len(documents)) + 1
        ended = chain.from_iterable((*ids, self.eos_id) for ids in documents)
        return np.fromiter(ended, np.int64, int(lengths.sum())), lengths


def bad_line_error(line: str) -> FormatError:
    """Return the error to raise unless bad lines are skipped."""
    return FormatError(
        f"{line}. Mend it; or pass --skip-bad-lines to leave such lines out, counted and named "
        "(with --resume, if some parts are finished already)."
    )


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically and durably."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


# ------------------------------------------------------------------------------ in a worker process


class Worker:
    """Writes parts in a process of its own, which ends with the process that started it."""

    _writer: PartWriter
    _counters: Any

    @classmethod
    def begin(cls, writer: PartWriter, counters: Any, alive: Connection) -> None:
        """Set up the process.

        Args:
            writer: writes the parts.
            counters: bytes read and tokens written, summed over all workers in shared memory.
            alive: ends this process when the other end is closed, as the parent's death does.
        """
        import signal
        import threading

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        cls._writer, cls._counters = writer, counters

        def end_with_parent() -> None:
            alive.poll(None)
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()

    @classmethod
    def write(cls, part: Part) -> Counts:
        """Write a part."""
        return cls._writer.write(part, cls._progress)

    @classmethod
    def _progress(cls, nbytes: int, tokens: int) -> None:
        with cls._counters.get_lock():
            cls._counters[0] += nbytes
            cls._counters[1] += tokens
