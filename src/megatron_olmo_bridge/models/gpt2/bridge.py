"""GPT-2: the published sizes and the mapping table."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron_olmo_bridge.mapping.mappings import (
    DirectMapping,
    FusedQKVMapping,
    Mapping,
    TransposedMapping,
)
from megatron_olmo_bridge.models.bridge import ModelBridge

from .config import GPT2Config


def _published(
    layers: int, hidden: int, heads: int, vocab: int = 50257, positions: int = 1024
) -> dict[str, Any]:
    last = vocab - 1
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": last,
        "embd_pdrop": 0.1,
        "eos_token_id": last,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_ctx": positions,
        "n_embd": hidden,
        "n_head": heads,
        "n_inner": None,
        "n_layer": layers,
        "n_positions": positions,
        "resid_pdrop": 0.1,
        "torch_dtype": "float32",
        "vocab_size": vocab,
    }


def gpt2_table(bridge: ModelBridge, padded_vocab_size: int | None) -> list[Mapping]:
    """Return GPT-2's mapping table; ``Conv1D`` weights are [in, out]."""
    c = bridge.config
    hidden, ffn = c.hidden_size, c.ffn_hidden_size
    return [
        DirectMapping(megatron_param="embedding.word_embeddings.weight",
                      hf_param="transformer.wte.weight", hf_shape=(c.vocab_size, hidden),
                      padded_rows=padded_vocab_size),
        DirectMapping(megatron_param="embedding.position_embeddings.weight",
                      hf_param="transformer.wpe.weight",
                      hf_shape=(c.max_position_embeddings, hidden)),
        DirectMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
                      hf_param="transformer.h.*.ln_1.weight", hf_shape=(hidden,)),
        DirectMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.layer_norm_bias",
                      hf_param="transformer.h.*.ln_1.bias", hf_shape=(hidden,)),
        FusedQKVMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",
                        hf_param="transformer.h.*.attn.c_attn.weight",
                        num_attention_heads=c.num_attention_heads, kv_channels=c.kv_channels,
                        hidden_size=hidden),
        FusedQKVMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.bias",
                        hf_param="transformer.h.*.attn.c_attn.bias",
                        num_attention_heads=c.num_attention_heads, kv_channels=c.kv_channels,
                        hidden_size=None),
        TransposedMapping(megatron_param="decoder.layers.*.self_attention.linear_proj.weight",
                          hf_param="transformer.h.*.attn.c_proj.weight", hf_shape=(hidden, hidden)),
        DirectMapping(megatron_param="decoder.layers.*.self_attention.linear_proj.bias",
                      hf_param="transformer.h.*.attn.c_proj.bias", hf_shape=(hidden,)),
        DirectMapping(megatron_param="decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
                      hf_param="transformer.h.*.ln_2.weight", hf_shape=(hidden,)),
        DirectMapping(megatron_param="decoder.layers.*.mlp.linear_fc1.layer_norm_bias",
                      hf_param="transformer.h.*.ln_2.bias", hf_shape=(hidden,)),
        TransposedMapping(megatron_param="decoder.layers.*.mlp.linear_fc1.weight",
                          hf_param="transformer.h.*.mlp.c_fc.weight", hf_shape=(hidden, ffn)),
        DirectMapping(megatron_param="decoder.layers.*.mlp.linear_fc1.bias",
                      hf_param="transformer.h.*.mlp.c_fc.bias", hf_shape=(ffn,)),
        TransposedMapping(megatron_param="decoder.layers.*.mlp.linear_fc2.weight",
                          hf_param="transformer.h.*.mlp.c_proj.weight", hf_shape=(ffn, hidden)),
        DirectMapping(megatron_param="decoder.layers.*.mlp.linear_fc2.bias",
                      hf_param="transformer.h.*.mlp.c_proj.bias", hf_shape=(hidden,)),
        DirectMapping(megatron_param="decoder.final_layernorm.weight",
                      hf_param="transformer.ln_f.weight", hf_shape=(hidden,)),
        DirectMapping(megatron_param="decoder.final_layernorm.bias",
                      hf_param="transformer.ln_f.bias", hf_shape=(hidden,)),
    ]  # fmt: skip


class GPT2Bridge(ModelBridge):
    """GPT-2: pre-norm blocks with biases, and learned positions."""

    family = "gpt2"
    architectures = ("GPT2LMHeadModel", "gpt2")
    hf_base = "GPT2Model"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-tiny": _published(4, 128, 8, vocab=1024, positions=128),
        "gpt2-124m": _published(12, 768, 12),
        "gpt2-355m": _published(24, 1024, 16),
        "gpt2-774m": _published(36, 1280, 20),
        "gpt2-1.5b": _published(48, 1600, 25),
    }
    config_class = GPT2Config
    provider_class = "megatron_olmo_bridge.models.gpt2.provider:GPT2ModelProvider"
    settings: ClassVar[dict[str, Any]] = {
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "gated_linear_unit": None,
        "layernorm_zero_centered_gamma": None,
        "apply_residual_connection_post_layernorm": None,
        "window_size": None,
        "softmax_scale": None,
        "squared_relu": None,
    }
    hf_embedding = "transformer.wte.weight"
    hf_layers = "transformer.h."
    ignored: ClassVar[dict[str, str]] = {
        "*h.*.attn.bias": "the causal mask, not a weight",
        "*h.*.attn.masked_bias": "a constant, not a weight",
    }

    table = gpt2_table

    @classmethod
    def with_layers(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return {**config, "n_layer": layers}
