"""OLMo-2's layer, ``x + norm(f(x))`` with no norm before f, made of megatron-core's modules."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.backends import AUTO, Backend, backend_named


def olmo2_layer_spec(config: TransformerConfig | None = None, backend: str = AUTO) -> ModuleSpec:
    """One layer.

    Args:
        config: of the model; if given, it is checked that it asks for the QK norm.
        backend: ``transformer_engine``, ``local``, or ``auto``: Transformer Engine where it is
            installed and there is CUDA, else local.

    Raises:
        InputError: the backend is unknown, or Transformer Engine isn't there; or the config is not
            one of OLMo-2's.
    """
    if config is not None and not config.qk_layernorm:
        raise InputError("OLMo-2 normalises queries and keys: the config must set qk_layernorm")
    return _layer_spec(backend_named(backend))


def _layer_spec(modules: Backend) -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=modules.column_parallel_linear,
        core_attention=modules.core_attention,
        linear_proj=modules.row_parallel_linear_post_norm,
        q_layernorm=modules.q_norm,
        k_layernorm=modules.k_norm,
    )
    mlp = MLPSubmodules(
        linear_fc1=modules.column_parallel_linear, linear_fc2=modules.row_parallel_linear_post_norm
    )
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
    config: TransformerConfig, vp_stage: int | None = None, backend: str = AUTO
) -> TransformerBlockSubmodules:
    """This pipeline stage's layers, and the final norm (built on the last stage only).

    A bare layer spec would leave the final norm to megatron-core, whose local one refuses sequence
    parallelism. Arguments and errors are those of :func:`olmo2_layer_spec`.
    """
    layers: list[Any] = [olmo2_layer_spec(config, backend)]
    layers *= get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend_named(backend).norm)
