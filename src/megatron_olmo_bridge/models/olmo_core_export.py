"""OLMo-core's config of a Hugging Face model, as its version 3.0 writes it.

Source: ``olmo_core/nn/transformer/config.py`` of ``ai2-olmo-core`` 3.0.0.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_olmo_bridge.errors import UnsupportedError

from .bridge import ModelBridge
from .olmo3.config import FULL, layer_types
from .olmo_core_config import BLOCKS, FORCED, TOKEN_IDS, attention_factor


def olmo_core_config(bridge: ModelBridge) -> dict[str, Any]:
    """Return a ``config.json`` of OLMo-core that describes the model, as version 3.0 writes it.

    Raises:
        UnsupportedError: OLMo-core has no such model.
    """
    c, hf = bridge.config, bridge.hf_config
    blocks = {kind.model_type: name for name, kind in BLOCKS.items()} | {"olmo3": "reordered_norm"}
    if bridge.family not in blocks or bridge.num_labels is not None or bridge.is_tied:
        what = "with tied embeddings" if bridge.is_tied else "that is converted"
        raise UnsupportedError(f"OLMo-core has no {bridge.family} model {what}")
    norm = _typed("layer_norm.LayerNormConfig", name="rms", eps=c.layernorm_epsilon, bias=False)
    block = _typed(
        "transformer.config.TransformerBlockConfig",
        name=blocks[bridge.family],
        sequence_mixer=_attention(bridge, norm),
        layer_norm=norm,
        **(_moe(bridge) if bridge.num_experts else _feed_forward(bridge)),
    )
    overrides = _layers_with_yarn(bridge, block) if bridge.family == "olmo3" else {}
    model = _typed(
        "transformer.config.TransformerConfig",
        name="moe" if bridge.num_experts else "default",
        d_model=c.hidden_size,
        vocab_size=c.vocab_size,
        n_layers=c.num_layers,
        block=block,
        lm_head=_typed("lm_head.LMHeadConfig", name="default", layer_norm=norm, bias=False),
        **({"block_overrides": overrides} if overrides else {}),
    )
    ids = {key: hf[key] for key in TOKEN_IDS if hf.get(key) is not None}
    tokenizer = {"vocab_size": c.vocab_size, **ids}
    return {
        "model": model,
        "train_module": {"max_sequence_length": c.max_position_embeddings},
        "dataset": {
            "tokenizer": {**tokenizer, "_CLASS_": "olmo_core.data.tokenizer.TokenizerConfig"}
        },
    }


def _typed(cls: str, /, **values: Any) -> dict[str, Any]:
    """Return a section of OLMo-core's config with the name of its class."""
    return {**values, "_CLASS_": f"olmo_core.nn.{cls}"}


def _attention(bridge: ModelBridge, norm: dict[str, Any]) -> dict[str, Any]:
    c = bridge.config
    values: dict[str, Any] = {
        "name": "default",
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_query_groups,
        "bias": False,
        "rope": _typed("rope.RoPEConfig", name="default", theta=_whole(c.rotary_base)),
        "qk_norm": norm,
        "type": "attention",
    }
    if c.kv_channels * c.num_attention_heads != c.hidden_size:
        values["head_dim"] = c.kv_channels
    if getattr(c, "clip_qkv", None) is not None:
        values["clip_qkv"] = c.clip_qkv
    if getattr(c, "window_size", None) is not None:
        window = c.window_size[0] + 1
        values["sliding_window"] = _typed(
            "attention.SlidingWindowAttentionConfig",
            pattern=[-1 if kind == FULL else window for kind in _layer_types(bridge)],
            **dict.fromkeys(FORCED, False),
        )
    return _typed("attention.AttentionConfig", **values)


def _feed_forward(bridge: ModelBridge) -> dict[str, Any]:
    size = bridge.config.ffn_hidden_size
    section = _typed("feed_forward.FeedForwardConfig", name="default", hidden_size=size, bias=False)
    return {"feed_forward": section}


def _moe(bridge: ModelBridge) -> dict[str, Any]:
    c = bridge.config
    router = _typed("moe.router.MoERouterConfig", name="default", top_k=c.moe_router_topk)
    if not c.moe_router_pre_softmax:
        router["normalize_expert_weights"] = 1.0
    section = _typed(
        "moe.moe.MoEConfig",
        name="dropless",
        num_experts=bridge.num_experts,
        hidden_size=c.ffn_hidden_size,
        router=router,
        lb_loss_weight=c.moe_aux_loss_coeff,
    )
    return {"feed_forward_moe": section}


def _layer_types(bridge: ModelBridge) -> list[str]:
    return bridge.hf_config.get("layer_types") or layer_types(bridge.num_layers)


def _layers_with_yarn(bridge: ModelBridge, block: dict[str, Any]) -> dict[str, Any]:
    """Return the blocks of the layers with YaRN, by the number of the layer."""
    yarn = bridge.config.full_attention_rope
    if yarn is None:
        return {}
    factor = yarn["scaling_factor"]
    if not math.isclose(yarn["attention_factor"], attention_factor(factor), rel_tol=1e-9):
        raise UnsupportedError(
            f"OLMo-core's YaRN has no attention_factor of {yarn['attention_factor']}"
        )
    scaling = _typed(
        "rope.YaRNRoPEScalingConfig",
        factor=factor,
        old_context_len=yarn["original_max_position_embeddings"],
        beta_fast=_whole(yarn["beta_fast"]),
        beta_slow=_whole(yarn["beta_slow"]),
    )
    attention = block["sequence_mixer"]
    scaled = {**attention, "rope": {**attention["rope"], "scaling": scaling}}
    types = enumerate(_layer_types(bridge))
    return {str(i): {**block, "sequence_mixer": scaled} for i, kind in types if kind == FULL}


def _whole(value: float) -> float:
    """Return a whole number as an int, which OLMo-core's config has for it."""
    return int(value) if value == int(value) else value
