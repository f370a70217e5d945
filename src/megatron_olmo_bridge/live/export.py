"""Stream a live model's weights out, one Hugging Face tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_olmo_bridge.errors import MappingError
from megatron_olmo_bridge.mapping.placement import Region, Shape, uncovered
from megatron_olmo_bridge.models.bridge import ModelBridge

from .load import cut
from .shards import LiveModel, Shard

ShardKey = tuple[str, Region]
"""Name of a Megatron parameter and the region of it that a process holds."""
_ORIGIN = Region(0, 0, 0, 0)


@dataclass(frozen=True)
class OwnedRegion:
    """A region of a Hugging Face tensor, and which shard of which process has its elements."""

    owner: int
    """Rank of the process."""
    shard: ShardKey
    shard_region: Region
    hf_region: Region
    transposed: bool
    """The rows of one region are the columns of the other."""


def stream_weights(
    chunks: Sequence[torch.nn.Module],
    bridge: ModelBridge,
    *,
    names: Iterable[str] | None = None,
    to: int | None = None,
    cpu: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every Hugging Face tensor of a live model with its name, one whole tensor at a time.

    All processes must iterate to the end: each sends its part of every tensor. Memory holds the
    tensor that is yielded and one process's part of it, and the previous tensor if the consumer
    keeps it.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        bridge: bridge of the model.
        names: tensors in the order to yield; by default that of the mapping.
        to: the only process that receives the tensors; by default all do.
        cpu: return them on the CPU instead of the model's device.

    Yields:
        Name and tensor, in the model's dtype.

    Raises:
        MappingError: the processes together don't hold each element of the model exactly once.
    """
    live = LiveModel.of(chunks, bridge)
    local_shards = {(s.parameter.name, s.region): s for s in live.shards if s.is_main}
    parts = _parts(live, list(local_shards))
    first = live.shards[0].data
    assembly = _Assembly(local_shards, to, first.dtype, first.device, cpu)
    for name in live.mapping.hf_shapes if names is None else names:
        whole = assembly.tensor(live.mapping.hf_shapes[name], parts[name])
        if whole is not None:
            yield name, whole
        del whole  # before the next is allocated


@dataclass(frozen=True)
class _Assembly:
    """Assemble tensors from the shards of all processes."""

    local_shards: dict[ShardKey, Shard]
    to: int | None
    dtype: torch.dtype
    device: torch.device
    cpu: bool

    def tensor(self, shape: Shape, parts: list[OwnedRegion]) -> torch.Tensor | None:
        """Return one tensor on the processes that receive it; all processes take part."""
        whole = None
        if self.to is None or self.to == dist.get_rank():
            device = torch.device("cpu") if self.cpu else self.device
            whole = torch.empty(shape, dtype=self.dtype, device=device)
        for owner in sorted({part.owner for part in parts}):
            owned = [part for part in parts if part.owner == owner]
            blocks = self._exchange(owned, owner, whole)
            if whole is not None:
                for part, block in zip(owned, blocks, strict=True):
                    out = cut(whole.view(shape[0], -1), part.hf_region)
                    if out.data_ptr() != block.data_ptr():  # else it was received in place
                        out.copy_(block.view_as(out))
        return whole

    def _exchange(
        self, parts: list[OwnedRegion], owner: int, whole: torch.Tensor | None
    ) -> Sequence[torch.Tensor]:
        """Return one owner's blocks of a tensor on the processes that receive it, else none."""
        rank, alone = dist.get_rank(), dist.get_world_size() == 1
        if rank == owner:
            blocks = [
                block.T if part.transposed else block
                for part in parts
                for block in [cut(self.local_shards[part.shard].matrix, part.shard_region)]
            ]
            if self.to is None and not alone:
                dist.broadcast(_packed(blocks), owner)
            elif self.to is not None and self.to != owner:
                dist.send(_packed(blocks), self.to)
            return blocks
        if whole is None:
            return []
        sizes = [part.hf_region.size for part in parts]
        if sizes == [whole.numel()] and whole.device == self.device:
            packed = whole.view(-1)
        else:
            packed = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        if self.to is None:
            dist.broadcast(packed, owner)
        else:
            dist.recv(packed, owner)
        return torch.split(packed, sizes)


def _packed(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Return the blocks concatenated; a single contiguous block is not copied."""
    if len(blocks) == 1:
        return blocks[0].reshape(-1)
    return torch.cat([block.reshape(-1) for block in blocks])


def _parts(live: LiveModel, held: list[ShardKey]) -> dict[str, list[OwnedRegion]]:
    """Return the owned regions that make up each Hugging Face tensor. Collective."""
    held_by_rank: list[list[ShardKey]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(held_by_rank, held)
    regions: dict[str, list[tuple[int, Region]]] = {name: [] for name in live.mapping.parameters}
    for owner, keys in enumerate(held_by_rank):
        for parameter, region in keys:
            regions[parameter].append((owner, region))
    parts: dict[str, list[OwnedRegion]] = {}
    for name, shape in live.mapping.hf_shapes.items():
        parts[name] = [
            OwnedRegion(
                owner,
                (p.megatron_name, region),
                part.moved(region, _ORIGIN),
                p.hf_region_of(part),
                p.transposed,
            )
            for p in live.mapping.placements_by_hf_name[name]
            for owner, region in regions[p.megatron_name]
            if (part := p.megatron_region.intersect(region))
        ]
        if why := uncovered(shape, (part.hf_region for part in parts[name])):
            raise MappingError(f"the model's processes don't hold all of {name}: {why}")
    return parts
