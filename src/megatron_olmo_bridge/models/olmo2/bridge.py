"""OLMo-2: the published sizes and the mapping table."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from dataclasses import asdict
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_olmo_bridge.mapping.mappings import DirectMapping, GatedMLPMapping, QKVMapping
from megatron_olmo_bridge.mapping.registry import MegatronMappingRegistry
from megatron_olmo_bridge.models.bridge import ModelBridge, register_bridge

from . import megatron_lm
from .config import HF_KEYS, Olmo2Config

if TYPE_CHECKING:
    from megatron_olmo_bridge.models.provider import GPTModelProvider


def _published(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int,
               vocab: int = 100352) -> dict[str, Any]:  # fmt: skip
    """A ``config.json`` as the released OLMo-2 checkpoints have it."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 100257 if vocab > 100257 else None,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 100277 if vocab > 100277 else None,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
    }


@register_bridge("Olmo2ForCausalLM", "Olmo1124ForCausalLM", "olmo2", "olmo_1124")
class Olmo2Bridge(ModelBridge):
    """OLMo-2: post-norm blocks, QK norm over the full projection width."""

    family = "olmo2"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "olmo2-tiny": _published(4, 128, 8, 4, 384, vocab=1024),
        "olmo2-1b": _published(16, 2048, 16, 16, 8192),
        "olmo2-7b": _published(32, 4096, 32, 32, 11008),
        "olmo2-13b": _published(40, 5120, 40, 40, 13824),
        "olmo2-32b": _published(64, 5120, 40, 8, 27648),
    }
    vocab_param = "embedding.word_embeddings.weight"

    hf_keys = HF_KEYS

    def __init__(self, hf_config: dict[str, Any]) -> None:
        super().__init__(hf_config)
        self.config = Olmo2Config.from_hf(hf_config)

    @property
    def numbers(self) -> dict[str, Any]:
        return asdict(self.config)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def mapping_registry(self, padded_vocab_size: int | None = None) -> MegatronMappingRegistry:
        c = self.config
        hidden = (c.hidden_size,)
        vocab = (c.vocab_size, c.hidden_size)
        q_width = c.num_attention_heads * c.kv_channels
        attn, hf_attn = "decoder.layers.*.self_attention", "model.layers.*.self_attn"
        mlp, hf_mlp = "decoder.layers.*.mlp", "model.layers.*.mlp"
        head = DirectMapping("output_layer.weight", "lm_head.weight", vocab, padded_vocab_size)
        tied = {"lm_head.weight": "tied to model.embed_tokens.weight"}
        return MegatronMappingRegistry(
            DirectMapping(self.vocab_param, "model.embed_tokens.weight", vocab, padded_vocab_size),
            QKVMapping(
                f"{attn}.linear_qkv.weight",
                f"{hf_attn}.q_proj.weight", f"{hf_attn}.k_proj.weight", f"{hf_attn}.v_proj.weight",
                c.num_attention_heads, c.num_query_groups, c.kv_channels, c.hidden_size,
            ),
            DirectMapping(f"{attn}.q_layernorm.weight", f"{hf_attn}.q_norm.weight", (q_width,)),
            DirectMapping(f"{attn}.k_layernorm.weight", f"{hf_attn}.k_norm.weight",
                          (c.num_query_groups * c.kv_channels,)),
            DirectMapping(f"{attn}.linear_proj.weight", f"{hf_attn}.o_proj.weight",
                          (c.hidden_size, q_width)),
            DirectMapping(f"{attn}.linear_proj.post_layernorm.weight",
                          "model.layers.*.post_attention_layernorm.weight", hidden),
            GatedMLPMapping(f"{mlp}.linear_fc1.weight", f"{hf_mlp}.gate_proj.weight",
                            f"{hf_mlp}.up_proj.weight", c.ffn_hidden_size, c.hidden_size),
            DirectMapping(f"{mlp}.linear_fc2.weight", f"{hf_mlp}.down_proj.weight",
                          (c.hidden_size, c.ffn_hidden_size)),
            DirectMapping(f"{mlp}.linear_fc2.post_layernorm.weight",
                          "model.layers.*.post_feedforward_layernorm.weight", hidden),
            DirectMapping("decoder.final_layernorm.weight", "model.norm.weight", hidden),
            *([] if c.share_embeddings_and_output_weights else [head]),
            num_layers=c.num_layers,
            ignored={"*rotary_emb.inv_freq": "computed from rope_theta, not a weight"}
            | (tied if c.share_embeddings_and_output_weights else {}),
        )  # fmt: skip

    @property
    def extra_state_modules(self) -> list[str]:
        attn, mlp = "decoder.layers.*.self_attention", "decoder.layers.*.mlp"
        return [
            f"{attn}.linear_qkv", f"{attn}.linear_proj", f"{attn}.linear_proj.post_layernorm",
            f"{mlp}.linear_fc1", f"{mlp}.linear_fc2", f"{mlp}.linear_fc2.post_layernorm",
            "decoder.final_layernorm",
        ]  # fmt: skip

    def megatron_args(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        return megatron_lm.checkpoint_args(
            self.config, padded_vocab_size=padded_vocab_size, dtype=dtype
        )

    def megatron_flags(self, padded_vocab_size: int, dtype: str) -> list[str]:
        return megatron_lm.megatron_lm_flags(
            self.config, padded_vocab_size=padded_vocab_size, dtype=dtype
        )

    def provider_fields(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        rows, usual = self.config.vocab_size, gcd(padded_vocab_size, 128)
        return {
            "_target_": "megatron_olmo_bridge.models.olmo2.provider.Olmo2ModelProvider",
            **asdict(self.config),
            # A multiple that pads the vocabulary to just the checkpoint's rows.
            "make_vocab_size_divisible_by":
                usual if padded_vocab_size - rows < usual else padded_vocab_size,
            "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
        }  # fmt: skip

    def provider(self, **fields: Any) -> GPTModelProvider:
        from .provider import Olmo2ModelProvider  # needs megatron-core

        return Olmo2ModelProvider.from_config(self.config, **fields)

    @classmethod
    def hf_config_from_megatron(
        cls, values: MappingABC[str, Any], vocab_size: int | None
    ) -> dict[str, Any]:
        return megatron_lm.config_from_args(values, vocab_size=vocab_size)
