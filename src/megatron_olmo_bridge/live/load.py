"""Load a checkpoint of any kind into a live model: each process reads only rows it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import for_each
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE, Piece
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.transfer import BLOCK, Transfer

from .shards import LiveModel, Shard


def load_weights(
    chunks: Sequence[torch.nn.Module], source: Checkpoint, reporter: Reporter | None = None
) -> int:
    """Set every parameter of this process's chunks from a checkpoint.

    Uses a few MiB of memory in addition to the parameters. Processes do not communicate.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        source: an opened checkpoint of the same model.
        reporter: receives the bytes read.

    Returns:
        Bytes of the checkpoint that this process requested.

    Raises:
        MappingError: the model does not match the checkpoint.
        FormatError: a file is truncated.
        InputError: a value is too large for the model's dtype, or the checkpoint was changed
            while it was read.
    """
    live = LiveModel.of(chunks, source.bridge)
    reporter = reporter or Reporter()
    total = sum(shard.data.numel() * ITEM_SIZE[source.dtypes[0]] for shard in live.shards)
    reporter.begin("loading", total)

    def load(shard: Shard) -> int:
        with Transfer() as transfer:
            done = fill(shard, source, transfer)
        reporter.advance(done)
        return done

    read = sum(for_each(load, live.shards, source.path))
    source.snapshot.check_unchanged()
    reporter.end()
    return read


def fill(shard: Shard, source: Checkpoint, transfer: Transfer) -> int:
    """Copy the elements of a shard from a checkpoint; return the bytes requested.

    Raises:
        FormatError: a file is truncated.
        InputError: a value is too large for the shard's dtype.
    """
    out, read = shard.matrix, 0
    with torch.no_grad():
        for piece in source.pieces(shard.parameter, shard.region):
            block = cut(out, piece.tensor_region)
            if piece.array is None:
                block.zero_()
                continue
            read += piece.tensor_region.size * ITEM_SIZE[piece.array.dtype]
            if _fill_block(block.T if piece.transposed else block, piece, transfer):
                raise InputError(
                    f"{piece.array.file}: values of {shard.parameter.name} are too large for "
                    "float16 and would become infinite. Use bfloat16 or float32."
                )
    return read


def _fill_block(block: torch.Tensor, piece: Piece, transfer: Transfer) -> bool:
    """Fill a block from the file, some rows at a time; return whether a value became infinite.

    Rows are read, not mapped into memory: if a mapped file is truncated, the process gets SIGBUS.
    """
    array, region = piece.array, piece.array_region
    assert array is not None
    columns, dtype = Region.whole(array.shape).columns, getattr(torch, array.dtype)
    step = max(1, BLOCK // (columns * ITEM_SIZE[array.dtype]))
    too_large = False
    for top in range(0, region.rows, step):
        bottom = min(top + step, region.rows)
        data = transfer.rows(array, region.top + top, region.top + bottom)
        rows = torch.frombuffer(data, dtype=dtype).view(-1, columns)
        stored = rows[:, region.left : region.right]
        block[top:bottom].copy_(stored)
        if block.dtype is torch.float16 is not dtype:
            too_large |= _too_large(stored, block[top:bottom])
    return too_large


def cut(matrix: torch.Tensor, region: Region) -> torch.Tensor:
    """Return a view of a region of a matrix."""
    return matrix[region.top : region.bottom, region.left : region.right]


def _too_large(stored: torch.Tensor, block: torch.Tensor) -> bool:
    return bool((block.isinf().cpu() & ~stored.isinf()).any())
