"""Size of a model: its parameters and FLOPs per token, counted in the family's mapping table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_olmo_bridge.models.bridge import ModelBridge


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter of the mapping table, which stands for all layers and experts."""

    name: str
    """Name with wildcards: ``decoder.layers.*.mlp.router.weight``."""
    shape: tuple[int, ...]
    layers: int
    """Number of layers that have it; 1 for a parameter outside of layers."""
    experts: int
    """Number of experts of a layer that have it; 1 for a parameter outside of experts."""
    active_experts: int
    """Number of experts that a token is routed to; 1 for a parameter outside of experts."""

    @property
    def size(self) -> int:
        """Number of elements in one layer and one expert."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Last module in the name: ``linear_qkv``."""
        return self.name.split(".")[-2]


def parameters_of(bridge: ModelBridge, padded_vocab_size: int | None = None) -> Iterator[Parameter]:
    """Yield the parameters of a model, by default without padding of the vocabulary."""
    for mapping in bridge.mapping_registry(padded_vocab_size).mappings:
        wildcards = mapping.megatron_param.count("*")
        layers = bridge.num_layers if wildcards else 1
        experts, active = 1, 1
        if wildcards > 1:
            experts, active = bridge.num_experts or 1, int(bridge.config.moe_router_topk)
        yield Parameter(mapping.megatron_param, mapping.megatron_shape, layers, experts, active)


def parameter_count(
    bridge: ModelBridge, *, embeddings: bool = True, active_only: bool = False
) -> int:
    """Return the number of parameters of the Hugging Face model; tied weights count once.

    Args:
        embeddings: count the embeddings of tokens and positions too. An untied output layer always
            counts.
        active_only: count the experts that a token is routed to, not all.
    """
    return sum(
        parameter.size
        * parameter.layers
        * (parameter.active_experts if active_only else parameter.experts)
        for parameter in parameters_of(bridge)
        if embeddings or not parameter.name.startswith("embedding.")
    )


def flops_per_token(bridge: ModelBridge, sequence_length: int) -> float:
    """Return forward and backward FLOPs per token of a full sequence.

    Count 6 per matrix element that a token is multiplied by: the output layer and the routed
    experts, but not the embedding, which is a look-up. Count 12 per query element and visible key,
    on average half of the sequence (causal mask), or fewer in layers with a window. Source: PaLM
    (Chowdhery et al. 2022), appendix B, which counts masked keys too; leaving them out follows
    Megatron-LM (``num_floating_point_operations`` in ``megatron/training/training.py``).
    Recomputation is not counted.
    """
    config = bridge.config
    matrix_elements = sum(
        parameter.size * parameter.layers * parameter.active_experts
        for parameter in parameters_of(bridge)
        if len(parameter.shape) == 2 and not parameter.name.startswith("embedding.")
    )
    if bridge.is_tied:
        matrix_elements += config.vocab_size * config.hidden_size
    query_elements = config.num_attention_heads * config.kv_channels
    longest = [min(window or sequence_length, sequence_length) for window in _windows(bridge)]
    visible_keys = sum(keys * (1 - keys / (2 * sequence_length)) for keys in longest)
    return float(6 * matrix_elements + 12 * query_elements * visible_keys)


def _windows(bridge: ModelBridge) -> list[int | None]:
    """Return for each layer how many tokens a query sees, itself included; None for all."""
    window = getattr(bridge.config, "window_size", None)
    frequency = getattr(bridge.config, "window_attn_skip_freq", None)
    if window is None:
        return [None] * bridge.num_layers
    if isinstance(frequency, list):
        has_window = [bool(flag) for flag in frequency]
    else:  # every frequency-th layer has no window
        has_window = [not frequency or (i + 1) % frequency != 0 for i in range(bridge.num_layers)]
    return [window[0] + 1 if flag else None for flag in has_window]
