"""Contiguous runs of bytes that a tensor consists of, and where a copy of it can share blocks.

File systems that share blocks between files do so only for whole blocks at the same place within a
block. So a tensor is written at its source's offset modulo the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megatron_olmo_bridge.formats.tensors import ITEM_SIZE, MixedView, Piece, TensorSpec, TensorView

BLOCK = 4096
"""Bytes of a block of XFS, Btrfs and APFS, as they are made by default."""
SHORT_RUN = 64 << 10
"""Bytes below which a run is cheaper to copy through memory than by a kernel call."""


def _is_contiguous(piece: Piece, view: TensorView) -> bool:
    width = piece.tensor_region.columns
    source = width if piece.array is None else piece.array.columns
    return width == source == view.columns


def runs_of(piece: Piece, view: TensorView) -> Iterator[tuple[int, int, int]]:
    """Yield (offset in the source file, offset in the tensor, bytes) of each contiguous run."""
    item = ITEM_SIZE[view.dtype]
    stored, region = piece.array_region, piece.tensor_region
    base, stride = 0, 0
    if piece.array is not None:
        base, stride = piece.array.offset, piece.array.row_bytes
    at = base + stored.top * stride + stored.left * item
    target_at = region.top * view.row_bytes + region.left * item
    if _is_contiguous(piece, view):
        yield at, target_at, region.size * item
        return
    for row in range(region.rows):
        yield at + row * stride, target_at + row * view.row_bytes, region.columns * item


def worth_kernel_copies(view: TensorView) -> bool:
    """Return whether a tensor is copied by the kernel, as its runs are long."""
    if isinstance(view, MixedView) or any(p.transposed for p in view.pieces):
        return False
    runs = sum(1 if _is_contiguous(p, view) else p.tensor_region.rows for p in view.pieces)
    return runs == 1 or view.nbytes >= runs * SHORT_RUN


def whole_blocks(source_at: int, target_at: int, count: int) -> tuple[int, int]:
    """Return the part of a run that consists of whole blocks in both files.

    Args:
        source_at: offset of the run in the source file.
        target_at: offset in the output file.
        count: bytes of the run.

    Returns:
        Bytes before the part, and bytes of the part; (0, 0) for a short run, which is copied.
    """
    before = -source_at % BLOCK
    if (source_at - target_at) % BLOCK or count < SHORT_RUN:
        return 0, 0
    return before, (count - before) // BLOCK * BLOCK


def shared_residue(view: TensorSpec | None, dtype: str) -> int | None:
    """Return the offset modulo ``BLOCK`` at which a copy of a tensor shares the most blocks.

    None if it would share none: the dtype changes, it is computed or transposed, or its runs are
    short.
    """
    if not isinstance(view, TensorView) or view.dtype != dtype or not worth_kernel_copies(view):
        return None
    nbytes: Counter[int] = Counter()
    for piece in view.pieces:
        if piece.array is not None:
            for source_at, target_at, count in runs_of(piece, view):
                if count >= SHORT_RUN:
                    nbytes[(source_at - target_at) % BLOCK] += count
    return nbytes.most_common(1)[0][0] if nbytes else None
