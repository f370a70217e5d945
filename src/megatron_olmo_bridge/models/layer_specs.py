"""Build decoder layer specs from megatron-core's modules."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_olmo_bridge.nn.backends import Backend

_PRE_NORM_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_PRE_MLP_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
"""Checkpoint keys of the norms before a linear. Source: megatron-core's own specs, which use them
whether norm and linear are one module (Transformer Engine's) or two."""


def decoder_layer(
    modules: Backend,
    *,
    pre_norm: Any = IdentityOp,
    attention: Any = SelfAttention,
    row_parallel_linear: Any,
    qk_norm: bool = False,
    mlp: ModuleSpec | None = None,
) -> ModuleSpec:
    """Return the spec of one decoder layer.

    Args:
        modules: modules that the layer is built from.
        pre_norm: class of the norms before attention and MLP.
        attention: class of the attention, a ``SelfAttention``.
        row_parallel_linear: class of ``linear_proj`` and ``linear_fc2``.
        qk_norm: normalise queries and keys over their full width.
        mlp: spec that replaces the dense MLP.
    """
    self_attention = SelfAttentionSubmodules(
        linear_qkv=modules.column_parallel_linear,
        core_attention=modules.core_attention,
        linear_proj=row_parallel_linear,
        q_layernorm=modules.q_norm if qk_norm else None,
        k_layernorm=modules.k_norm if qk_norm else None,
    )
    dense = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=modules.column_parallel_linear, linear_fc2=row_parallel_linear
        ),
    )
    keys = {} if pre_norm is IdentityOp else _PRE_NORM_KEYS | ({} if mlp else _PRE_MLP_KEYS)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=pre_norm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=self_attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_norm,
            mlp=mlp or dense,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def mixture_of_experts(modules: Backend, config: TransformerConfig) -> ModuleSpec:
    """Return megatron-core's mixture of experts: sequential, or grouped by Transformer Engine."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # megatron-core 0.16.1's router reads it in any case
    return get_moe_module_spec(
        use_te=modules.transformer_engine,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
