"""Fingerprint of a model's weights: the root of a hash tree over the bytes of its tensors.

It depends on names, dtypes, shapes and bytes alone, not on the format, its files or their layout.
docs/fingerprint.md is the specification. The hash tree is that of RFC 6962, section 2.1.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_olmo_bridge.errors import FormatError, quote
from megatron_olmo_bridge.formats.files import LEAVES_LIMIT, read_json
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE, Readable, TensorSpec

from .plan import WORKERS
from .progress import Reporter
from .transfer import Transfer

VERSION = 1
"""Version of the specification, recorded in files of leaves."""
BLOCK_BYTES = 4 << 20
"""Bytes of a block; the last block of a tensor may have fewer."""
SPAN = 16
"""Maximum number of successive blocks of a tensor that a thread takes at a time."""
_LEAF, _NODE, _TENSOR = b"\x00", b"\x01", b"\x02"
"""Prefixes that keep a block, a node and a tensor from having the same hash."""
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HashedTensor(TensorSpec):
    """A tensor and the hashes of its blocks."""

    blocks: tuple[bytes, ...]

    @property
    def hash(self) -> bytes:
        """SHA-256 of the tensor's blocks, dtype, shape and name."""
        shape = ",".join(map(str, self.shape))
        described = f"{self.dtype} {shape} {self.name}".encode()
        return hashlib.sha256(_TENSOR + tree_hash(self.blocks) + described).digest()


class BlockOf(NamedTuple):
    """A block of a tensor, by its number."""

    tensor: Readable
    number: int

    @property
    def begin(self) -> int:
        """First byte, in the row-major bytes of the tensor."""
        return self.number * BLOCK_BYTES

    @property
    def end(self) -> int:
        """Byte after the last one."""
        return min(self.begin + BLOCK_BYTES, self.tensor.nbytes)


def is_fingerprint(value: object) -> bool:
    """Return whether a value is written as fingerprints are: 64 lowercase hexadecimal digits."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def tree_hash(hashes: Sequence[bytes]) -> bytes:
    """Return the root of the tree over these hashes: pairs are hashed until one is left.

    A hash without a partner moves up unchanged, as in RFC 6962. No hashes give the SHA-256 of
    nothing.
    """
    level = list(hashes)
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        nodes = [hashlib.sha256(_NODE + left + right).digest() for left, right in pairs]
        level = nodes + level[2 * len(nodes) :]
    return level[0] if level else hashlib.sha256().digest()


def root_of(tensors: Iterable[HashedTensor]) -> str:
    """Return the fingerprint of a model with these tensors, in any order."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name.encode())
    return tree_hash([tensor.hash for tensor in ordered]).hex()


def blocks_of(tensor: Readable) -> list[BlockOf]:
    """Return the blocks of a tensor; none if it has no elements."""
    return [BlockOf(tensor, number) for number in range(_block_count(tensor))]


def _block_count(tensor: TensorSpec) -> int:
    return -(-tensor.nbytes // BLOCK_BYTES)


def hash_tensors(
    tensors: Iterable[Readable], workers: int = WORKERS, reporter: Reporter | None = None
) -> list[HashedTensor]:
    """Read tensors, and return them with the hashes of their blocks; for arguments and errors see
    :func:`hash_blocks`."""
    tensors = list(tensors)
    blocks = [block for tensor in tensors for block in blocks_of(tensor)]
    hashes = iter(hash_blocks(blocks, workers, reporter))
    return [
        HashedTensor(t.name, t.shape, t.dtype, tuple(islice(hashes, _block_count(t))))
        for t in tensors
    ]


def hash_blocks(
    blocks: Sequence[BlockOf], workers: int = WORKERS, reporter: Reporter | None = None
) -> list[bytes]:
    """Read blocks, and return the hash of each.

    Args:
        blocks: the blocks; those of a tensor stand together.
        workers: number of threads. Each holds one block.
        reporter: receives the bytes read.

    Raises:
        FormatError: a file is truncated.
    """
    reporter = reporter or Reporter()

    def hash_span(span: Sequence[BlockOf]) -> list[bytes]:
        hashes = []
        with Transfer() as transfer:
            for block in span:
                data = transfer.read(block.tensor, block.begin, block.end)
                digest = hashlib.sha256(_LEAF)
                digest.update(data)  # in parallel: hashlib releases the GIL
                hashes.append(digest.digest())
                reporter.advance(len(data))
        return hashes

    spans = groupby(blocks, key=lambda block: (block.tensor.name, block.number // SPAN))
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(hash_span, [list(span) for _, span in spans])
        return [digest for hashes in results for digest in hashes]


# ------------------------------------------------------------------------------- files of leaves


def encode_leaves(tensors: Iterable[HashedTensor]) -> bytes:
    """Return the JSON file with the hashes of all blocks, against which single blocks are checked.

    Raises:
        FormatError: the file would be larger than :func:`read_leaves` reads.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name.encode())
    value = {
        "version": VERSION,
        "fingerprint": root_of(ordered),
        "block_bytes": BLOCK_BYTES,
        "tensors": {
            t.name: {"dtype": t.dtype, "shape": t.shape, "blocks": [b.hex() for b in t.blocks]}
            for t in ordered
        },
    }
    data = json.dumps(value, separators=(",", ":")).encode() + b"\n"
    if len(data) > LEAVES_LIMIT:
        raise FormatError(f"its leaves have {len(data):,} bytes; the limit is {LEAVES_LIMIT:,}")
    return data


def read_leaves(file: Path) -> list[HashedTensor]:
    """Return the tensors in a file of leaves, whose fingerprint is :func:`root_of` these.

    Raises:
        FormatError: the file is not one of leaves, or its fingerprint is not that of its leaves.
        InputError, FileNotFoundError, PermissionError: see :func:`formats.files.read_small`.
    """
    value = read_json(file, LEAVES_LIMIT)
    if value.get("version") != VERSION or value.get("block_bytes") != BLOCK_BYTES:
        raise FormatError(
            f"{file}: not the leaves of a fingerprint of version {VERSION}, in blocks of "
            f"{BLOCK_BYTES:,} bytes. olmo-bridge fingerprint --leaves writes them."
        )
    entries = value.get("tensors")
    if not isinstance(entries, dict):
        raise FormatError(f"{file}: has no tensors")
    tensors = []
    for name, entry in entries.items():
        if (tensor := _parsed(name, entry)) is None:
            raise FormatError(
                f"{file}: {quote(name)} is not described by a dtype, a shape and the SHA-256 of "
                "each block"
            )
        tensors.append(tensor)
    if value.get("fingerprint") != root_of(tensors):
        raise FormatError(f"{file}: its fingerprint is not that of its leaves: it was changed")
    return tensors


def _parsed(name: str, entry: Any) -> HashedTensor | None:
    """Return the tensor that an entry describes; None if it doesn't."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "blocks": list(blocks)}:
            sizes_are_valid = all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
            if dtype not in ITEM_SIZE or not sizes_are_valid:
                return None
            if not all(map(is_fingerprint, blocks)):
                return None
            hashes = tuple(map(bytes.fromhex, blocks))
            tensor = HashedTensor(name, tuple(shape), dtype, hashes)
            return tensor if len(hashes) == _block_count(tensor) else None
    return None
