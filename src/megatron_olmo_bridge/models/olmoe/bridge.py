"""OLMoE: the config, the published sizes and the mapping table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron_olmo_bridge.mapping.mappings import Mapping
from megatron_olmo_bridge.models.bridge import DecoderBridge
from megatron_olmo_bridge.models.config import MoEConfig, published
from megatron_olmo_bridge.models.hf_values import HFValues
from megatron_olmo_bridge.models.tables import attention, embedding, experts, final_norm, norm


@dataclass(frozen=True)
class OlmoeConfig(MoEConfig):
    """Config of OLMoE: experts, and clamped queries, keys and values."""

    label = "OLMoE"
    hf_defaults: ClassVar[dict[str, Any]] = MoEConfig.hf_defaults | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "clip_qkv": None,
    }

    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this, after the QK norm."""

    @classmethod
    def read(cls, hf: HFValues) -> dict[str, Any]:
        return super().read(hf) | {"clip_qkv": hf.optional_number("clip_qkv")}


_published = partial(
    published,
    "OlmoeForCausalLM",
    vocab=50304,
    eos=50279,
    pad=1,
    model_type="olmoe",
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    clip_qkv=None,
    norm_topk_prob=False,
    num_experts=64,
    num_experts_per_tok=8,
    output_router_logits=False,
    router_aux_loss_coef=0.01,
)


class OlmoeBridge(DecoderBridge):
    """OLMoE: pre-norm blocks, QK norm over the full projection width, experts."""

    family = "olmoe"
    architectures = ("OlmoeForCausalLM", "olmoe")
    hf_base = "OlmoeModel"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "olmoe-tiny": _published(
            2, 128, 8, 4, 96, num_experts=8, num_experts_per_tok=3, clip_qkv=0.5, vocab=1024
        ),
        "olmoe-1b-7b": _published(16, 2048, 16, 16, 1024),
    }
    layouts = "TP, PP, SP, EP"
    config_class = OlmoeConfig
    provider_class = "megatron_olmo_bridge.models.olmoe.provider:OlmoeModelProvider"

    def table(self, padded_vocab_size: int | None) -> list[Mapping]:
        c = self.config
        return [
            embedding(c, padded_vocab_size),
            # The norm before attention, by its name in checkpoints.
            norm(
                c,
                megatron_param="decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
                hf_param="model.layers.*.input_layernorm.weight",
            ),
            *attention(c, qk_norm=True),
            norm(
                c,
                megatron_param="decoder.layers.*.pre_mlp_layernorm.weight",
                hf_param="model.layers.*.post_attention_layernorm.weight",
            ),
            *experts(c),
            final_norm(c),
        ]
