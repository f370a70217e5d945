"""Shards of a live model, as reported by the model itself.

``sharded_state_dict()`` of a megatron-core model says which region of which global tensor each
tensor holds, at any parallel layout. Loading and exporting need nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.utils import nested_values
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_olmo_bridge.errors import InputError, MappingError
from megatron_olmo_bridge.mapping.placement import Region, Shape
from megatron_olmo_bridge.mapping.registry import Parameter, ResolvedMapping
from megatron_olmo_bridge.models.bridge import ModelBridge

_BEYOND_SHAPES = (
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "clip_qkv",
    "window_size",
    "window_attn_skip_freq",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "activation",
)
"""Config values in which two models can differ although their tensors have the same shapes."""


@dataclass(frozen=True)
class Shard:
    """A block of a Megatron parameter in this process's memory."""

    parameter: Parameter
    region: Region
    """The block, in the whole parameter."""
    data: torch.Tensor
    """Its elements, of the model's own dtype, on the model's device."""
    is_main: bool
    """True on exactly one of the processes that hold this block."""

    @property
    def matrix(self) -> torch.Tensor:
        """View of the elements as [rows, columns] of the region."""
        return self.data.detach().view(self.region.rows, self.region.columns)


@dataclass(frozen=True)
class LiveModel:
    """The shards of this process's chunks, and the mapping of the whole model."""

    mapping: ResolvedMapping
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, chunks: Sequence[torch.nn.Module], bridge: ModelBridge) -> LiveModel:
        """Read the shards of chunks from ``provide_distributed_model``, wrapped or not.

        Raises:
            InputError: no chunks.
            MappingError: a tensor of the model is not in the mapping, has another shape there, or
                a parameter of the model is in no checkpoint.
        """
        if not chunks:
            raise InputError("there is no model: the list of chunks is empty")
        tensors: list[ShardedTensor] = []
        for chunk in unwrap_model(list(chunks)):
            _check_numbers(chunk.config, bridge)
            _check_tying(chunk, bridge)
            state = chunk.sharded_state_dict()
            _check_complete(chunk, state)
            tensors += sharded_tensors(state)
        finder = Finder.of(bridge, tensors)
        return cls(finder.mapping, tuple(finder.shard(tensor) for tensor in tensors))


@dataclass(frozen=True)
class Finder:
    """Find the parameter and region that a sharded tensor holds."""

    mapping: ResolvedMapping
    by_key: dict[tuple[str, tuple[int, ...]], Parameter]
    """Parameters by key and index along the stacked axes (layers, experts) of that key."""

    @classmethod
    def of(cls, bridge: ModelBridge, tensors: Iterable[ShardedTensor]) -> Finder:
        """Create a finder for these tensors, whose shapes give the padded vocabulary size."""
        mapping = bridge.mapping_registry().resolve()
        known = mapping.parameters
        padded = {
            tensor.global_shape[0]
            for tensor in tensors
            if tensor.key in known and known[tensor.key].shape[0] < tensor.global_shape[0]
        }
        if len(padded) == 1:
            mapping = bridge.mapping_registry(padded.pop()).resolve()
        by_key: dict[tuple[str, tuple[int, ...]], Parameter] = {}
        for parameter in mapping.parameters.values():
            axes = len(parameter.index)
            for stacked in range(axes + 1):
                by_key[parameter.key(stacked), parameter.index[axes - stacked :]] = parameter
        return cls(mapping, by_key)

    def shard(self, tensor: ShardedTensor) -> Shard:
        """Return the shard that a tensor holds.

        Raises:
            MappingError: the tensor is not in the mapping, or has another shape there.
        """
        axes = tensor.prepend_axis_num
        parameter = self.by_key.get((tensor.key, tuple(tensor.global_offset[:axes])))
        if parameter is None:
            raise MappingError(f"the model has a tensor {tensor.key} that the mapping doesn't know")
        shape: Shape = tuple(tensor.global_shape[axes:])
        if shape != parameter.shape:
            raise MappingError(
                f"{parameter.name} has shape {list(shape)} in the model, the config asks for "
                f"{list(parameter.shape)}"
            )
        block = Region.whole(tensor.local_shape)
        down, *across = tensor.global_offset[axes:]
        at = Region(down, down, across[0] if across else 0, 0)
        return Shard(
            parameter,
            block.moved(Region(0, 0, 0, 0), at),
            tensor.data,
            is_main_replica(tensor.replica_id),
        )


def sharded_tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    """Return the tensors of a sharded state dict; those stored in two parts are returned as two.

    The parts share the memory of the model's tensor, so writing to them fills it.
    """
    apply_factories(state)
    found = []
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            found.append(value)
        elif not isinstance(value, ShardedObject):  # extra state, which is not loaded
            raise MappingError(f"the model's state has a {type(value).__name__}, not only tensors")
    return found


def _check_numbers(config: TransformerConfig, bridge: ModelBridge) -> None:
    """Raise MappingError if config values differ that don't affect any shape."""
    for name in _BEYOND_SHAPES:
        expected, found = bridge.config_values.get(name), getattr(config, name, None)
        if expected is not None and found != expected:
            raise MappingError(f"{name} is {found} in the model, the config asks for {expected}")


def _check_tying(chunk: torch.nn.Module, bridge: ModelBridge) -> None:
    """Raise MappingError if the head is tied in only one of model and checkpoint."""
    expected = bridge.config.share_embeddings_and_output_weights
    found = getattr(chunk, "share_embeddings_and_output_weights", expected)
    if bridge.num_labels is None and found != expected:
        raise MappingError(
            f"share_embeddings_and_output_weights is {found} in the model, the checkpoint asks for "
            f"{expected}"
        )


def _check_complete(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Raise MappingError if a parameter is missing from the model's own state dict."""
    tied = getattr(chunk, "share_embeddings_and_output_weights", False)
    for name, _ in chunk.named_parameters():
        if name not in state and not (tied and name.startswith("output_layer.")):
            raise MappingError(
                f"{name} is a parameter of the model, but not in its sharded_state_dict()"
            )
