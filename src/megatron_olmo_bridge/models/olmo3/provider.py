"""Build OLMo-3 in megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer import ModuleSpec

from megatron_olmo_bridge.models.layer_specs import decoder_layer
from megatron_olmo_bridge.models.olmo2.provider import Olmo2ModelProvider
from megatron_olmo_bridge.nn.self_attention import RopePerLayerTypeSelfAttention


@dataclass
class Olmo3ModelProvider(Olmo2ModelProvider):
    """Provider of OLMo-3; ``rotary_base`` is for the layers with a window."""

    full_attention_rope: dict[str, Any] | None = None
    """YaRN of the layers without a window: ``rotary_base``, ``scaling_factor``,
    ``original_max_position_embeddings``, ``beta_fast``, ``beta_slow``, ``attention_factor``. None
    if they use the same rope as the others."""

    def layer_spec(self) -> ModuleSpec:
        return decoder_layer(
            self.modules,
            attention=RopePerLayerTypeSelfAttention,
            row_parallel_linear=self.modules.row_parallel_linear_post_norm,
            qk_norm=True,
        )
