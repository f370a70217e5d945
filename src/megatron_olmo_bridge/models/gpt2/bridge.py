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

ATTENTION, MLP = "decoder.layers.*.self_attention", "decoder.layers.*.mlp"
HF = "transformer.h.*"


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


class GPT2Bridge(ModelBridge):
    """GPT-2: pre-norm blocks with biases, learned positions, ``Conv1D`` weights [in, out]."""

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

    @classmethod
    def with_layers(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return {**config, "n_layer": layers}

    def table(self, padded_vocab_size: int | None) -> list[Mapping]:
        c = self.config
        h, ffn = c.hidden_size, c.ffn_hidden_size
        heads = (c.num_attention_heads, c.kv_channels)
        positions, qkv = (c.max_position_embeddings, h), f"{ATTENTION}.linear_qkv"
        return [
            DirectMapping(self.vocab_param, self.hf_embedding, (c.vocab_size, h),
                          padded_vocab_size),
            DirectMapping("embedding.position_embeddings.weight", "transformer.wpe.weight",
                          positions),
            *_norm(h, f"{qkv}.layer_norm_", f"{HF}.ln_1."),
            FusedQKVMapping(f"{qkv}.weight", f"{HF}.attn.c_attn.weight", *heads, h),
            FusedQKVMapping(f"{qkv}.bias", f"{HF}.attn.c_attn.bias", *heads, None),
            *_linear(f"{ATTENTION}.linear_proj", f"{HF}.attn.c_proj", h, h),
            *_norm(h, f"{MLP}.linear_fc1.layer_norm_", f"{HF}.ln_2."),
            *_linear(f"{MLP}.linear_fc1", f"{HF}.mlp.c_fc", h, ffn),
            *_linear(f"{MLP}.linear_fc2", f"{HF}.mlp.c_proj", ffn, h),
            *_norm(h, "decoder.final_layernorm.", "transformer.ln_f."),
        ]  # fmt: skip


def _norm(width: int, megatron: str, hf: str) -> list[Mapping]:
    return [DirectMapping(f"{megatron}{n}", f"{hf}{n}", (width,)) for n in ("weight", "bias")]


def _linear(megatron: str, hf: str, inputs: int, outputs: int) -> list[Mapping]:
    return [
        TransposedMapping(f"{megatron}.weight", f"{hf}.weight", (inputs, outputs)),
        DirectMapping(f"{megatron}.bias", f"{hf}.bias", (outputs,)),
    ]
