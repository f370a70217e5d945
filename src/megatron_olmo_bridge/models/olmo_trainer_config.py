"""Config and tensor names of the models of OLMo's first trainer, in Hugging Face's terms.

The trainer is the PyPI package ``ai2-olmo``; this module follows version 0.6.0: ``ModelConfig`` in
``olmo/config.py``, ``OLMoSequentialBlock`` and ``SwiGLU`` in ``olmo/model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .hf_values import MAX_LAYERS
from .olmo_core_config import Section

TRAINER_TENSORS = {
    "model.embed_tokens.weight": ("transformer.wte.weight", 0),
    "model.layers.*.self_attn.q_proj.weight": ("transformer.blocks.*.att_proj.weight", 0),
    "model.layers.*.self_attn.k_proj.weight": ("transformer.blocks.*.att_proj.weight", 1),
    "model.layers.*.self_attn.v_proj.weight": ("transformer.blocks.*.att_proj.weight", 2),
    "model.layers.*.self_attn.o_proj.weight": ("transformer.blocks.*.attn_out.weight", 0),
    "model.layers.*.self_attn.q_norm.weight": ("transformer.blocks.*.q_norm.weight", 0),
    "model.layers.*.self_attn.k_norm.weight": ("transformer.blocks.*.k_norm.weight", 0),
    "model.layers.*.post_attention_layernorm.weight": ("transformer.blocks.*.attn_norm.weight", 0),
    "model.layers.*.mlp.up_proj.weight": ("transformer.blocks.*.ff_proj.weight", 0),
    "model.layers.*.mlp.gate_proj.weight": ("transformer.blocks.*.ff_proj.weight", 1),
    "model.layers.*.mlp.down_proj.weight": ("transformer.blocks.*.ff_out.weight", 0),
    "model.layers.*.post_feedforward_layernorm.weight": ("transformer.blocks.*.ff_norm.weight", 0),
    "model.norm.weight": ("transformer.ln_f.weight", 0),
    "lm_head.weight": ("transformer.ff_out.weight", 0),
}
"""Hugging Face tensor: the trainer's tensor, and its place among those that it fuses by rows."""
_NO_EFFECT = {
    "attention_dropout", "residual_dropout", "embedding_dropout", "flash_attention",
    "rope_full_precision", "precision", "init_device", "init_fn", "init_std",
    "init_cutoff_factor", "emb_init_std", "alibi_bias_max", "block_group_size",
    "low_cpu_fsdp", "fused_moe_router",
}  # fmt: skip
"""Keys that only change training, initialization, rounding or speed."""


def trainer_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` of the Hugging Face model that a ``config.yaml`` describes.

    Raises:
        InputError: a value is absent or not of its type.
        UnsupportedError: a setting has no counterpart in OLMo and OLMo-2.
    """
    model = Section(config.get("model"), "model", no_effect=_NO_EFFECT, **_DEFAULTS)
    model.expect("activation_type", "swiglu")
    model.expect("block_type", "sequential")
    model.expect("rope", True)
    model.expect("include_bias", False)
    hidden, heads = model.count("d_model"), model.count("n_heads")
    groups, vocab_size = model.optional_count("n_kv_heads"), model.count("vocab_size")
    if model.get("multi_query_attention"):
        groups = 1
    up_and_gate = model.count("mlp_ratio") * hidden
    values = {
        "vocab_size": model.optional_count("embedding_size") or vocab_size,
        "hidden_size": hidden,
        "intermediate_size": (model.optional_count("mlp_hidden_size") or up_and_gate) // 2,
        "num_hidden_layers": model.count("n_layers", MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": model.count("max_sequence_length"),
        "rope_theta": model.number("rope_theta"),
        "tie_word_embeddings": model.flag("weight_tying"),
        "bos_token_id": None,
        "eos_token_id": model.optional_whole("eos_token_id"),
        "pad_token_id": model.optional_whole("pad_token_id"),
    }
    values |= _olmo2(model) if model.flag("norm_after") else _olmo(model)
    model.refuse_others()
    return values


def _olmo2(model: Section) -> dict[str, Any]:
    for key in (
        "attention_layer_norm",
        "layer_norm_with_affine",
        "attention_layer_norm_with_affine",
    ):
        model.expect(key, True)
    model.expect("layer_norm_type", "rms")
    model.expect("bias_for_layer_norm", False, None)
    model.expect("clip_qkv", None)
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "rms_norm_eps": model.number("layer_norm_eps"),
    }


def _olmo(model: Section) -> dict[str, Any]:
    model.expect("layer_norm_type", "default", "low_precision")
    model.expect("layer_norm_with_affine", False)
    model.expect("attention_layer_norm", False)
    model.get("attention_layer_norm_with_affine")
    model.expect("layer_norm_eps", 1e-5)
    values = {"architectures": ["OlmoForCausalLM"], "model_type": "olmo"}
    clip = model.optional_number("clip_qkv")
    return values if clip is None else values | {"clip_qkv": clip}


_DEFAULTS: dict[str, Any] = {
    "n_kv_heads": None, "clip_qkv": None, "mlp_ratio": 4, "mlp_hidden_size": None,
    "activation_type": "swiglu", "block_type": "sequential", "rope": False, "rope_theta": 10_000,
    "multi_query_attention": None, "attention_layer_norm": False, "layer_norm_type": "default",
    "layer_norm_with_affine": True, "layer_norm_eps": 1e-5, "include_bias": True,
    "attention_layer_norm_with_affine": True, "bias_for_layer_norm": None,
    "max_sequence_length": 1024, "vocab_size": 50257, "embedding_size": 50304,
    "weight_tying": True, "eos_token_id": 50256, "pad_token_id": 50256, "norm_after": False,
}  # fmt: skip
"""Defaults of ``ModelConfig``."""
