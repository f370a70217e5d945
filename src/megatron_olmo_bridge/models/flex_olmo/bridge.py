"""FlexOlmo: the published size; its table is OLMo-2's attention and OLMoE's experts."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from megatron_olmo_bridge.mapping.mappings import Mapping
from megatron_olmo_bridge.models.bridge import DecoderBridge
from megatron_olmo_bridge.models.config import MoEConfig, published
from megatron_olmo_bridge.models.tables import attention, embedding, experts, final_norm, norm


class FlexOlmoConfig(MoEConfig):
    """Config of FlexOlmo: OLMoE's without clamping."""

    label = "FlexOlmo"
    hf_defaults: ClassVar[dict[str, Any]] = MoEConfig.hf_defaults | {
        "vocab_size": 100352,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "num_experts": 7,
        "num_experts_per_tok": 5,
    }


_published = partial(
    published,
    "FlexOlmoForCausalLM",
    vocab=100352,
    eos=100257,
    pad=100277,
    model_type="flex_olmo",
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=500000,
    norm_topk_prob=False,
    num_experts=7,
    num_experts_per_tok=5,
    output_router_logits=False,
    router_aux_loss_coef=0.01,
)


class FlexOlmoBridge(DecoderBridge):
    """FlexOlmo: OLMo-2's post-norm blocks, with experts."""

    family = "flex_olmo"
    architectures = ("FlexOlmoForCausalLM", "flex_olmo")
    hf_base = "FlexOlmoModel"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "flex-olmo-tiny": _published(
            2, 128, 8, 4, 96, num_experts=4, num_experts_per_tok=3, vocab=1024
        ),
        "flex-olmo-7x7b": _published(32, 4096, 32, 32, 11008),
    }
    layouts = "TP, PP, SP, EP"
    config_class = FlexOlmoConfig
    provider_class = "megatron_olmo_bridge.models.flex_olmo.provider:FlexOlmoModelProvider"

    def table(self, padded_vocab_size: int | None) -> list[Mapping]:
        c = self.config
        return [
            embedding(c, padded_vocab_size),
            *attention(c, qk_norm=True),
            norm(
                c,
                megatron_param="decoder.layers.*.self_attention.linear_proj.post_layernorm.weight",
                hf_param="model.layers.*.post_attention_layernorm.weight",
            ),
            *experts(c),
            norm(
                c,
                megatron_param="decoder.layers.*.mlp.post_layernorm.weight",
                hf_param="model.layers.*.post_feedforward_layernorm.weight",
            ),
            final_norm(c),
        ]
