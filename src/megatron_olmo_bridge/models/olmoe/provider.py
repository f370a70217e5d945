"""Build OLMoE in megatron-core."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import ModuleSpec

from megatron_olmo_bridge.models.layer_specs import decoder_layer, mixture_of_experts
from megatron_olmo_bridge.models.provider import MoEProvider
from megatron_olmo_bridge.nn.self_attention import ClippedSelfAttention


@dataclass
class OlmoeModelProvider(MoEProvider):
    """Provider of OLMoE."""

    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    clip_qkv: float | None = None
    """Limit that queries, keys and values are clamped to after the QK norm; None for no limit."""
    moe_z_loss_coeff: float | None = 0.001
    """Weight of the router's z-loss in training. Source: allenai/OLMo
    ``configs/official/OLMoE-1B-7B-0824.yml``, ``moe_zloss_weight``."""

    def layer_spec(self) -> ModuleSpec:
        return decoder_layer(
            self.modules,
            pre_norm=self.modules.norm,
            attention=ClippedSelfAttention,
            row_parallel_linear=self.modules.row_parallel_linear,
            qk_norm=True,
            mlp=mixture_of_experts(self.modules, self),
        )
