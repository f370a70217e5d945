"""Raw token files in the order in which OLMo-core's data loader reads them.

OLMo's token data are ``.npy`` files without a header: token ids and nothing else. A mix is a list
of such files. Source of the order and of the filter: ``ai2-olmo-core`` 3.0.0,
``NumpyFSLDataset`` and ``find_periodic_sequences`` in ``olmo_core/data``, and
``NumpyDataLoaderBase``, which is the same since version 1.9.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.files import MIX_LIMIT, read_small

MAX_PERIOD, MIN_REPEATS = 13, 32
"""Longest pattern, and fewest repeats of it, for which the filter leaves out a sequence."""
_DTYPES = (np.uint8, np.uint16, np.uint32)


def read_mix(mix: Path, root: Path, tokenizer: str | None = None) -> list[Path]:
    """Return the token files that a list names, in its order.

    Args:
        mix: a file with a path per line, relative to ``root``: either as ``data_paths.txt`` of an
            OLMo-core checkpoint, or as OLMo-core's mixes, with a label and a comma before each
            path. Empty lines and lines that begin with ``#`` are skipped.
        root: folder of the token files.
        tokenizer: what ``{TOKENIZER}`` in a path stands for.

    Raises:
        InputError: the list is empty, names a URL or an absent file, or needs ``tokenizer``.
        FormatError: it is not text; or see :func:`.read_small`.
    """
    try:
        lines = read_small(mix, MIX_LIMIT).decode().splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{mix}: is not a list of paths: not UTF-8 text") from error
    files = []
    for number, line in enumerate(lines, start=1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        name = text.rpartition(",")[2]
        if "://" in name:
            raise InputError(f"{mix}: line {number} names a URL, {name}: fetch it first")
        if "{TOKENIZER}" in name and tokenizer is None:
            raise InputError(f"{mix}: line {number} needs the name of the tokenizer: {name}")
        file = root / name.replace("{TOKENIZER}", tokenizer or "")
        if not file.is_file():
            raise InputError(f"{mix}: line {number}: no file {file}")
        files.append(file)
    if not files:
        raise InputError(f"{mix}: names no files")
    return files


@dataclass(frozen=True)
class TokenFiles:
    """Sequences of a fixed length from the files of a mix; the rest of each file is left out."""

    files: Sequence[Path]
    sequence_length: int
    vocab_size: int
    """Size of the tokenizer's vocabulary, which determines the dtype of the files."""

    @cached_property
    def dtype(self) -> type[np.unsignedinteger]:
        return next(d for d in _DTYPES if self.vocab_size - 1 <= np.iinfo(d).max)

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each file."""
        sizes = [file.stat().st_size for file in self.files]
        for file, size in zip(self.files, sizes, strict=True):
            if size % np.dtype(self.dtype).itemsize:
                raise FormatError(
                    f"{file}: {size} bytes, which is not a whole number of {self.dtype.__name__} "
                    f"tokens; is data.vocab_size, {self.vocab_size}, right?"
                )
        return sizes

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Number of the sequence after the last one of each file."""
        width = self.sequence_length * np.dtype(self.dtype).itemsize
        return np.array(list(accumulate(size // width for size in self.sizes)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return a sequence [sequence_length], int64."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        at = index - (int(self._ends[file - 1]) if file else 0)
        tokens: NDArray[np.unsignedinteger] = np.fromfile(
            self.files[file],
            self.dtype,
            self.sequence_length,
            offset=at * self.sequence_length * np.dtype(self.dtype).itemsize,
        )
        if len(tokens) < self.sequence_length:
            raise FormatError(f"{self.files[file]}: truncated while it was read")
        return tokens.astype(np.int64)

    def fingerprint(
        self, pad_token_id: int | None, eos_token_id: int | None, bos_token_id: int | None
    ) -> str:
        """Return OLMo-core's fingerprint 2.0 of the dataset: names and sizes, not contents."""
        fields = {
            "vocab_size": self.vocab_size,
            "pad_token_id": pad_token_id,
            "eos_token_id": eos_token_id,
            "dtype": self.dtype,
            "max_target_sequence_length": None,
            "bos_token_id": bos_token_id,
        }
        sha = hashlib.sha256(b"class=NumpyFSLDataset")
        for name, value in fields.items():
            sha.update(f"{name}={value},".encode())
        for file, size in zip(self.files, self.sizes, strict=True):
            sha.update(f"path={file.name},size={size},".encode())
        return sha.hexdigest()


@dataclass
class ShuffledBatches:
    """Sequences in OLMo-core's order: each epoch is shuffled, and its incomplete batch dropped."""

    count: int
    """Number of sequences."""
    batch_size: int
    """Sequences per global batch."""
    seed: int
    _epoch: int = field(default=0, init=False)
    _order: NDArray[np.uint32] = field(init=False)

    def __post_init__(self) -> None:
        if self.batches_per_epoch == 0:
            raise InputError(
                f"the data has {self.count} sequences, fewer than a batch of {self.batch_size}"
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.count // self.batch_size

    def batch(self, number: int) -> NDArray[np.uint32]:
        """Return the sequences of a global batch, numbered from 0 over all epochs."""
        epoch, index = divmod(number, self.batches_per_epoch)
        if self._epoch != epoch + 1:
            self._epoch = epoch + 1
            self._order = np.arange(self.count, dtype=np.uint32)
            np.random.Generator(np.random.PCG64(self.seed + self._epoch)).shuffle(self._order)
        return self._order[index * self.batch_size : (index + 1) * self.batch_size]


def is_repetitive(tokens: NDArray[np.int64]) -> bool:
    """Return whether a sequence repeats at most ``MAX_PERIOD`` tokens ``MIN_REPEATS`` times."""
    for period in range(1, min(MAX_PERIOD, len(tokens) // 3) + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        bounds = np.concatenate(([-1], differs, [len(tokens) - period]))
        longest = int(np.diff(bounds).max()) - 1
        if (longest + period) // period >= MIN_REPEATS:
            return True
    return False
