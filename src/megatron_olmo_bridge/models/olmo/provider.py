"""Build OLMo in megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer import ModuleSpec

from megatron_olmo_bridge.models.layer_specs import decoder_layer
from megatron_olmo_bridge.models.provider import DecoderProvider
from megatron_olmo_bridge.nn.layer_norm import WeightlessLayerNorm
from megatron_olmo_bridge.nn.self_attention import ClippedSelfAttention


@dataclass
class OlmoModelProvider(DecoderProvider):
    """Provider of OLMo."""

    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    clip_qkv: float | None = None
    """Limit that queries, keys and values are clamped to; None for no limit."""

    def layer_spec(self) -> ModuleSpec:
        return decoder_layer(
            self.modules,
            pre_norm=WeightlessLayerNorm,
            attention=ClippedSelfAttention,
            row_parallel_linear=self.modules.row_parallel_linear,
        )

    def final_norm(self) -> Any:
        return WeightlessLayerNorm
