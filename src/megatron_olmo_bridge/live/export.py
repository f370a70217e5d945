"""Stream a live model's weights out, one Hugging Face tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_olmo_bridge.errors import MappingError
from megatron_olmo_bridge.mapping.placement import Region, uncovered
from megatron_olmo_bridge.models.bridge import ModelBridge

from .load import cut
from .shards import LiveModel, Shard

ShardKey = tuple[str, Region]
"""Name of a Megatron parameter, and the region of it that a process holds."""
_ORIGIN = Region(0, 0, 0, 0)


@dataclass(frozen=True)
class Part:
    """A block of a Hugging Face tensor, and the process that holds it."""

    owner: int
    shard: ShardKey
    source: Region
    """The block, in the owner's shard."""
    target: Region
    """The block, in the Hugging Face tensor."""


def stream_weights(
    chunks: Sequence[torch.nn.Module],
    bridge: ModelBridge,
    *,
    names: Iterable[str] | None = None,
    to: int | None = None,
    cpu: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor of a live model, by name; whole, and no more than one at a time.

    All processes must iterate to the end: each sends what it holds of a tensor when its turn comes.
    Beside the tensor that is yielded, a process holds one process's part of it; a consumer that
    keeps the last tensor while it asks for the next adds that.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        bridge: of the model's family.
        names: the order; by default that of the model's state dict.
        to: the only process that is given the tensors; by default all are.
        cpu: give them on the CPU instead of the model's device.

    Yields:
        Name and tensor, of the model's dtype.

    Raises:
        MappingError: the processes together don't hold the whole model, each element once.
    """
    live = LiveModel.of(chunks, bridge)
    mine = {(s.parameter.name, s.region): s for s in live.shards if s.is_main}
    parts = _parts(live, list(mine))
    receives = to is None or to == dist.get_rank()
    dtype, device = live.shards[0].data.dtype, live.shards[0].data.device
    for name in live.mapping.hf_shapes if names is None else names:
        shape = live.mapping.hf_shapes[name]
        whole = None
        if receives:
            whole = torch.empty(shape, dtype=dtype, device="cpu" if cpu else device)
        for owner in sorted({part.owner for part in parts[name]}):
            theirs = [part for part in parts[name] if part.owner == owner]
            blocks = _exchange(theirs, mine, owner, to, _buffer(theirs, whole, device, dtype))
            if whole is not None:
                for part, block in zip(theirs, blocks, strict=True):
                    out = cut(whole.view(shape[0], -1), part.target)
                    if out.data_ptr() != block.data_ptr():  # else it was received in its place
                        out.copy_(block.view_as(out))
        if whole is not None:
            yield name, whole
        del whole  # before the next is made


def _parts(live: LiveModel, held: list[ShardKey]) -> dict[str, list[Part]]:
    """Which process holds which block of each Hugging Face tensor."""
    everybody: list[list[ShardKey]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, held)
    regions: dict[str, list[tuple[int, Region]]] = {name: [] for name in live.mapping.parameters}
    for owner, keys in enumerate(everybody):
        for parameter, region in keys:
            regions[parameter].append((owner, region))
    parts: dict[str, list[Part]] = {}
    for name, shape in live.mapping.hf_shapes.items():
        parts[name] = [
            Part(owner, (block.parameter, region), found.moved(region, _ORIGIN),
                 found.moved(block.target, block.source))
            for block in live.mapping.hf_blocks[name]
            for owner, region in regions[block.parameter]
            if (found := block.target.intersect(region))
        ]  # fmt: skip
        if why := uncovered(shape, (part.target for part in parts[name])):
            raise MappingError(f"the model's processes don't hold all of {name}: {why}")
    return parts


def _buffer(
    parts: list[Part], whole: torch.Tensor | None, device: torch.device, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """Makes the memory that blocks are received in: the tensor's own, where they are all of it."""
    size = sum(part.target.size for part in parts)
    if whole is not None and whole.device == device and len(parts) == 1 and size == whole.numel():
        return lambda: whole.view(-1)
    return lambda: torch.empty(size, dtype=dtype, device=device)


def _exchange(
    parts: list[Part],
    mine: dict[ShardKey, Shard],
    owner: int,
    to: int | None,
    buffer: Callable[[], torch.Tensor],
) -> Sequence[torch.Tensor]:
    """What one process holds of a tensor, block by block, where it is wanted; nothing elsewhere."""
    rank, alone = dist.get_rank(), dist.get_world_size() == 1
    if rank == owner:
        blocks = [cut(mine[part.shard].matrix, part.source) for part in parts]
        if to is None and not alone:
            dist.broadcast(_packed(blocks), owner)
        elif to is not None and to != owner:
            dist.send(_packed(blocks), to)
        return blocks
    if to is not None and rank != to:
        return []
    packed = buffer()
    if to is None:
        dist.broadcast(packed, owner)
    else:
        dist.recv(packed, owner)
    return torch.split(packed, [part.target.size for part in parts])


def _packed(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Blocks one after the other; a single one as it is, if it is contiguous."""
    if len(blocks) == 1:
        return blocks[0].reshape(-1)
    return torch.cat([block.reshape(-1) for block in blocks])
