"""Read documents from JSON Lines, text and Parquet files as a stream.

A file is read in spans that can be read independently of each other: byte ranges of a plain file
(a line belongs to the span in which it begins), row groups of a Parquet file, a compressed file
whole. Blank lines are skipped. Lines and rows that can't be read become :class:`BadLine`.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any

from megatron_olmo_bridge.errors import FormatError, InputError

TEXTS_AT_ONCE = 1 << 20
"""Characters after which a batch ends."""
_BLOCK = 1 << 20
_ROWS = 256
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


class Kind(Enum):
    """Kind of an input file."""

    JSON = "JSON Lines"
    TXT = "text"
    PARQUET = "Parquet"
    TOKENS = "token ids"


_KINDS = {
    ".jsonl": Kind.JSON,
    ".json": Kind.JSON,
    ".txt": Kind.TXT,
    ".parquet": Kind.PARQUET,
    ".npy": Kind.TOKENS,
}


@dataclass(frozen=True)
class TextOptions:
    """Options that define the documents of a file."""

    text_field: str = "text"
    """Field of JSON Lines, or column of Parquet."""
    txt_documents: str = "line"
    """Each ``line`` of a .txt file is a document, or each ``file``."""


@dataclass(frozen=True)
class Span:
    """A range of a file that one process reads at once."""

    path: str
    begin: int
    end: int
    """Both in bytes; in row groups for Parquet, in tokens for token files."""
    nbytes: int
    """Its share of the file."""


@dataclass(frozen=True)
class BadLine:
    """A line (in Parquet a row, from 1) that can't be used, and why."""

    path: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.why}"


@dataclass
class Batch:
    """Documents in the order of the file."""

    texts: list[str] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    nbytes: int = 0
    """Bytes of the file, as stored, that were read for the batch."""


def split_name(path: str | Path) -> tuple[Kind | None, str | None]:
    """Return a file's kind and compression by its name; None if unknown or uncompressed."""
    name, suffix = os.path.splitext(str(path))  # noqa: PTH122
    compression = _COMPRESSION.get(suffix)
    kind = _KINDS.get(Path(name).suffix if compression else suffix)
    if compression and kind not in (Kind.JSON, Kind.TXT):
        kind = None
    return kind, compression


def text_spans(path: str, limit: int, options: TextOptions) -> list[Span]:
    """Return the spans of a file in order, of at most ``limit`` bytes where it can be split.

    Raises:
        InputError: a Parquet file without the column.
        FormatError: a Parquet file that is damaged.
    """
    size = Path(path).stat().st_size
    kind, compression = split_name(path)
    if kind is Kind.PARQUET:
        return _row_groups(path, size, options.text_field)
    if compression or (kind is Kind.TXT and options.txt_documents == "file"):
        return [Span(path, 0, size, size)]
    cuts = [*range(0, size, limit), size]
    return [Span(path, a, b, b - a) for a, b in pairwise(cuts)]


def read_texts(span: Span, options: TextOptions) -> Iterator[Batch]:
    """Read a span, in batches.

    Raises:
        FormatError: the file is damaged: compressed and cut short, for example.
        OSError: the disk can't be read.
    """
    batch, done, characters = Batch(), 0, 0
    try:
        for position, record in _records(span, options):
            if isinstance(record, BadLine):
                batch.bad.append(record)
            else:
                batch.texts.append(record)
                characters += len(record)
            if characters >= TEXTS_AT_ONCE:
                batch.nbytes, done, characters = position - done, position, 0
                yield batch
                batch = Batch()
    except OSError as error:
        if error.errno is not None:
            raise
        # pyarrow's error about the file's content, not the disk's
        raise FormatError(f"{span.path}: damaged or cut short: {error}. Fetch it anew.") from error
    batch.nbytes = span.nbytes - done
    yield batch


def _records(span: Span, options: TextOptions) -> Iterator[tuple[int, str | BadLine]]:
    """Yield each text or bad line, with the bytes of the span that have been read so far."""
    kind, compression = split_name(span.path)
    by_line = kind is Kind.JSON or (kind is Kind.TXT and options.txt_documents == "line")
    if by_line:
        rows = _lines(span, compression)
    elif kind is Kind.PARQUET:
        rows = _rows(span, options.text_field)
    else:
        rows = _whole(span, compression)
    for number, (position, data) in enumerate(rows, 1):
        if by_line and (not data or data.isspace()):
            continue
        try:
            if data is None:
                raise ValueError("null, not a text")
            text = data.decode()
            yield position, _field(text, options.text_field) if kind is Kind.JSON else text
        except (ValueError, RecursionError) as error:
            line = _records_before(span) + number
            if isinstance(error, UnicodeDecodeError) and kind is Kind.TXT:
                line += error.object.count(b"\n", 0, error.start)  # if the file is one document
            yield position, BadLine(span.path, line, _why(error))


def _field(line: str, name: str) -> str:
    """Return the text of a line of JSON, or raise ValueError that says what is wrong."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"{_kind_of(record)}, not an object with a field {name!r}")
    if name not in record:
        raise ValueError(f"no field {name!r}; its fields: {', '.join([*record][:9]) or 'none'}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {_kind_of(value)}, not a text")
    value.encode()
    return value


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} ({error.object[error.start]:#x})"
    if isinstance(error, UnicodeEncodeError):
        return "the text has half of a surrogate pair"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}, at column {error.colno}"
    return str(error)


# ------------------------------------------------------------------------------------------- lines


@contextlib.contextmanager
def _opened(path: str, compression: str | None) -> Iterator[tuple[io.BufferedReader, IO[bytes]]]:
    """Yield a file's decompressed stream, and the file itself, whose position is the progress."""
    with Path(path).open("rb") as file:
        stream = file
        if compression:
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(file, compression), _BLOCK)
        if stream.peek(3).startswith(codecs.BOM_UTF8):
            stream.read(3)  # a byte order mark is not text
        yield stream, file


def _whole(span: Span, compression: str | None) -> Iterator[tuple[int, bytes | None]]:
    with _opened(span.path, compression) as (stream, _):
        yield span.nbytes, stream.read()


def _lines(span: Span, compression: str | None) -> Iterator[tuple[int, bytes | None]]:
    with _opened(span.path, compression) as (stream, file):
        at = 0
        if span.begin:
            stream.seek(span.begin - 1)
            at = span.begin - 1 + len(stream.readline())  # that line began in the span before
        elif not compression:
            at = stream.tell()
        while (compression or at < span.end) and (line := stream.readline()):
            at = file.tell() if compression else at + len(line)
            yield at - span.begin, line.rstrip(b"\r\n")


@lru_cache
def _records_before(span: Span) -> int:
    """Return the number of lines or rows before a span."""
    if span.begin == 0:
        return 0
    if split_name(span.path)[0] is Kind.PARQUET:
        metadata = _parquet(span.path).metadata
        return sum(metadata.row_group(i).num_rows for i in range(span.begin))
    count, left = 1, span.begin - 1  # the span's begin is in a line, or at its end
    with Path(span.path).open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count


# ----------------------------------------------------------------------------------------- Parquet


def _parquet(path: str) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise FormatError(f"{path}: not a Parquet file, or cut short: {error}") from error


def _row_groups(path: str, size: int, column: str) -> list[Span]:
    """Return a span for each row group; the file's bytes are divided by the groups' sizes."""
    import pyarrow.types as types

    file = _parquet(path)
    schema = file.schema_arrow
    if column not in schema.names:
        raise InputError(
            f"{path}: no column {column!r}; it has {', '.join(schema.names)}. "
            "--text-field names the one with the text."
        )
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise InputError(f"{path}: column {column!r} is {kind}, not text")
    groups = range(file.num_row_groups)
    ends = [0, *accumulate(file.metadata.row_group(i).total_byte_size for i in groups)]
    shares = [size * end // max(ends[-1], 1) for end in ends]
    return [Span(path, i, i + 1, shares[i + 1] - shares[i]) for i in groups]


def _rows(span: Span, column: str) -> Iterator[tuple[int, bytes | None]]:
    import pyarrow

    file = _parquet(span.path)
    total = sum(file.metadata.row_group(i).num_rows for i in range(span.begin, span.end))
    done = 0
    try:
        for batch in file.iter_batches(
            _ROWS, row_groups=range(span.begin, span.end), columns=[column], use_threads=False
        ):
            # As bytes: for one text that is not UTF-8, pyarrow would refuse the whole batch.
            for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                done += 1
                yield span.nbytes * done // total, data
    except pyarrow.ArrowException as error:
        raise FormatError(f"{span.path}: damaged: {error}. Fetch it anew.") from error
