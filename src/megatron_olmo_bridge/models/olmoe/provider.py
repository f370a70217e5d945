"""Builds OLMoE in megatron-core."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import ModuleSpec

from megatron_olmo_bridge.models.layer_specs import decoder_layer, mixture_of_experts
from megatron_olmo_bridge.models.provider import DecoderProvider
from megatron_olmo_bridge.nn.self_attention import ClippedSelfAttention


@dataclass
class MoEModelProvider(DecoderProvider):
    """Base provider of OLMoE and FlexOlmo: QK norm, and top-k experts by the router's softmax."""

    normalization: str = "RMSNorm"
    """Kind of all norms."""
    qk_layernorm: bool = True
    """Queries and keys are normalised, over the full width of their projection."""
    moe_router_pre_softmax: bool = True
    """Take routing weights from the softmax over all experts; if False, they sum to one."""
    moe_router_load_balancing_type: str = "aux_loss"
    """Load-balancing method in training."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss."""

    def __post_init__(self) -> None:
        # On the CPU experts run one after the other; Transformer Engine has a kernel for all.
        self.moe_grouped_gemm = self.modules.transformer_engine
        super().__post_init__()


@dataclass
class OlmoeModelProvider(MoEModelProvider):
    """The config of an OLMoE model, and the model built from it."""

    layernorm_epsilon: float = 1e-5
    """Added to the mean square in all norms."""
    rotary_base: float = 10000.0
    """Theta of the rotary embedding."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this, after the QK norm; None for not at all."""
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
