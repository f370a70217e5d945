"""Read and write Megatron's indexed datasets: token ids in a .bin, their places in an .idx.

An .idx is, little-endian: 9 bytes of magic, uint64 version 1, uint8 code of the dtype, uint64
number of sequences S, uint64 number of document bounds D + 1; then S int32 lengths in tokens, S
int64 byte offsets into the .bin, D + 1 int64 bounds: document d is the sequences bounds[d] to
bounds[d + 1].
Source: ``megatron/core/datasets/indexed_dataset.py``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_olmo_bridge.errors import FormatError, InputError

from .prefix import prefix_of

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""megatron-core's ``DType``, without the floating-point ones, which can't be token ids."""


@dataclass(frozen=True)
class Indexed:
    """A memory-mapped indexed dataset."""

    prefix: str
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    """Tokens of each sequence: [S]."""
    bounds: NDArray[np.int64]
    """Sequences at which documents begin, and the end of the last: [D + 1]."""

    @property
    def documents(self) -> int:
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def document_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each document: [D]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.asarray(np.diff(ends[self.bounds]))

    def first_tokens(self, count: int) -> NDArray[Any]:
        """Return the first ``count`` ids, or fewer if there are fewer."""
        return np.fromfile(self.prefix + ".bin", self.dtype, min(count, self.tokens))


def read_indexed(path: str | Path) -> Indexed:
    """Map a dataset and check the sizes of both files.

    Args:
        path: its prefix, or one of its files.

    Raises:
        InputError: one of the files is missing.
        FormatError: damaged, cut short, or not the index of this .bin.
    """
    prefix = prefix_of(path)
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (index, data):
        if not file.is_file():
            raise InputError(
                f"{file}: no such file. A dataset is a .bin and an .idx with the same prefix."
            )
    size = index.stat().st_size
    with index.open("rb") as handle:
        header = handle.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise FormatError(f"{index}: not the index of a Megatron dataset")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != 1 or code not in _CODES:
        raise FormatError(f"{index}: version {version}, dtype code {code}: not one of token ids")
    need = _HEADER.size + sequences * 12 + bounds * 8
    if size < need:
        raise FormatError(f"{index}: cut short: {size:,} bytes, its header promises {need:,}")
    mapped = np.memmap(index, mode="r")
    lengths = np.frombuffer(mapped, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(mapped, "<i8", sequences, _HEADER.size + sequences * 4)
    ends = np.frombuffer(mapped, "<i8", bounds, _HEADER.size + sequences * 12)
    if (
        bounds == 0
        or ends[0] != 0
        or ends[-1] != sequences
        or (np.diff(ends) < 0).any()
        or lengths.min(initial=0) < 0
    ):
        raise FormatError(f"{index}: damaged: its documents are not made of its sequences")
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    if (offsets != before * np.dtype(_CODES[code]).itemsize).any():
        raise FormatError(f"{index}: damaged: its sequences do not follow each other in the .bin")
    found = Indexed(prefix, np.dtype(_CODES[code]), lengths, ends)
    need, size = found.tokens * found.dtype.itemsize, data.stat().st_size
    if size != need:
        why = "cut short" if size < need else f"not the data of {index.name}"
        raise FormatError(f"{data}: {why}: {size:,} bytes, {index.name} promises {need:,}")
    return found


def write_index(path: Path, lengths: NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """Write the .idx of a .bin in which each document is one sequence."""
    code = next(code for code, name in _CODES.items() if name == dtype.name)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    with path.open("wb") as out:
        out.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        lengths.astype("<i4").tofile(out)
        np.concatenate([[0], ends])[: len(lengths)].astype("<i8").tofile(out)
        np.arange(len(lengths) + 1, dtype="<i8").tofile(out)
