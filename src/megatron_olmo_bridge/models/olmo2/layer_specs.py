"""OLMo-2's layer, ``x + norm(f(x))`` with no norm before f, made of megatron-core's modules."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_olmo_bridge.nn.post_norm import RMSNorm, RowParallelLinearPostLN
from megatron_olmo_bridge.nn.qk_norm import KRMSNorm, QRMSNorm


def olmo2_layer_spec() -> ModuleSpec:
    """One layer, without Transformer Engine. The config must set ``qk_layernorm``."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinearPostLN,
        q_layernorm=QRMSNorm,
        k_layernorm=KRMSNorm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinearPostLN)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


OLMO2_LAYER_SPEC: ModuleSpec = olmo2_layer_spec()
"""For Megatron-LM's ``--spec``, which looks a name up in the module and doesn't call it."""


def olmo2_block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """This pipeline stage's layers, and the final norm (built on the last stage only).

    A bare layer spec would leave the final norm to megatron-core, whose local one refuses sequence
    parallelism.
    """
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[olmo2_layer_spec()] * num_layers, layer_norm=RMSNorm
    )
