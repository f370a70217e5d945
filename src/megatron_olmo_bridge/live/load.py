"""Fill a live model from a checkpoint of either kind: each process reads its own share, no more."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_olmo_bridge.convert.reporter import Reporter
from megatron_olmo_bridge.convert.source import Source
from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE, StoredArray
from megatron_olmo_bridge.mapping.placement import Region

from .shards import LiveModel, Shard


def load_weights(
    chunks: Sequence[torch.nn.Module], source: Source, reporter: Reporter | None = None
) -> int:
    """Set every parameter of this process's chunks from a checkpoint.

    The files are mapped into memory and copied from there into the parameters; nothing else is
    held. No process talks to another.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        source: an opened checkpoint of the same model.
        reporter: told of the bytes read.

    Returns:
        Bytes of the checkpoint that this process asked for.

    Raises:
        MappingError: the model is not the checkpoint's.
        FormatError: a file ends too soon.
        InputError: a value is too large for the model's dtype.
    """
    live = LiveModel.of(chunks, source.bridge)
    reporter, files = reporter or Reporter(), MappedFiles()
    total = sum(shard.data.numel() * ITEM_SIZE[source.dtypes[0]] for shard in live.shards)
    reporter.begin("loading", total)
    read = 0
    for shard in live.shards:
        done = fill(shard, source, files)
        reporter.advance(done)
        read += done
    reporter.end()
    return read


class MappedFiles:
    """Files as memory, mapped when they are first asked for. Reading them allocates nothing."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def matrix(self, array: StoredArray) -> torch.Tensor:
        """An array of a file as [rows, columns], rows being its first dimension. Not to be written.

        Raises:
            FormatError: the file ends too soon.
        """
        if array.file not in self._maps:
            with array.file.open("rb") as handle:
                # A private mapping: torch takes no buffer that is read only.
                self._maps[array.file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        memory = self._maps[array.file]
        if array.offset + array.nbytes > len(memory):
            raise FormatError(f"{array.file}: truncated at byte {len(memory)}")
        whole = Region.whole(array.shape)
        elements = torch.frombuffer(
            memory, dtype=getattr(torch, array.dtype), count=whole.size, offset=array.offset
        )
        return elements.view(whole.rows, whole.columns)


def fill(shard: Shard, source: Source, files: MappedFiles) -> int:
    """Copy a shard's elements out of a checkpoint; returns the bytes read.

    Raises:
        FormatError: a file ends too soon.
        InputError: a value is too large for the shard's dtype.
    """
    out, read = shard.matrix, 0
    with torch.no_grad():
        for piece in source.pieces(shard.parameter, shard.region):
            block = cut(out, piece.target)
            if piece.array is None:
                block.zero_()
                continue
            stored = cut(files.matrix(piece.array), piece.source)
            stored = stored.T if piece.transposed else stored
            block.copy_(stored)
            read += stored.nbytes
            if block.dtype is torch.float16 is not stored.dtype and _too_large(stored, block):
                raise InputError(
                    f"{piece.array.file}: values of {shard.parameter.name} are too large for "
                    "float16 and would become infinite. Use bfloat16 or float32."
                )
    return read


def cut(matrix: torch.Tensor, region: Region) -> torch.Tensor:
    """A region of a matrix; the same memory."""
    return matrix[region.top : region.bottom, region.left : region.right]


def _too_large(stored: torch.Tensor, block: torch.Tensor) -> bool:
    return bool((block.isinf().cpu() & ~stored.isinf()).any())
