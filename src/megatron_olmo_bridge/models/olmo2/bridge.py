"""OLMo-2: the published sizes and the mapping table."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from megatron_olmo_bridge.mapping.mappings import Mapping
from megatron_olmo_bridge.models.bridge import DecoderBridge, ModelBridge
from megatron_olmo_bridge.models.config import published
from megatron_olmo_bridge.models.tables import attention, embedding, final_norm, gated_mlp, norm

from .config import Olmo2Config
from .megatron_lm import checkpoint_args, hf_config, megatron_lm_flags

_published = partial(
    published,
    "Olmo2ForCausalLM",
    vocab=100352,
    eos=100257,
    pad=100277,
    model_type="olmo2",
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=500000,
)


def olmo2_table(bridge: ModelBridge, padded_vocab_size: int | None) -> list[Mapping]:
    """Return the mapping table of OLMo-2 and OLMo-3."""
    c = bridge.config
    return [
        embedding(c, padded_vocab_size),
        *attention(c, qk_norm=True),
        norm(
            c,
            megatron_param="decoder.layers.*.self_attention.linear_proj.post_layernorm.weight",
            hf_param="model.layers.*.post_attention_layernorm.weight",
        ),
        *gated_mlp(c),
        norm(
            c,
            megatron_param="decoder.layers.*.mlp.linear_fc2.post_layernorm.weight",
            hf_param="model.layers.*.post_feedforward_layernorm.weight",
        ),
        final_norm(c),
    ]


class Olmo2Bridge(DecoderBridge):
    """OLMo-2: post-norm blocks, QK norm over the full projection width."""

    family = "olmo2"
    architectures = (
        "Olmo2ForCausalLM",
        "Olmo1124ForCausalLM",
        "Olmo2ForSequenceClassification",
        "olmo2",
        "olmo_1124",
    )
    hf_base = "Olmo2Model"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "olmo2-tiny": _published(4, 128, 8, 4, 384, vocab=1024),
        "olmo2-1b": _published(16, 2048, 16, 16, 8192),
        "olmo2-7b": _published(32, 4096, 32, 32, 11008),
        "olmo2-13b": _published(40, 5120, 40, 40, 13824),
        "olmo2-32b": _published(64, 5120, 40, 8, 27648),
    }
    layouts = "TP, PP, VPP, SP, DP"
    config_class = Olmo2Config
    provider_class = "megatron_olmo_bridge.models.olmo2.provider:Olmo2ModelProvider"

    table = olmo2_table
    hf_config_of_record = staticmethod(hf_config)

    # Stock Megatron-LM can build the language model, but not a classifier.

    def megatron_args(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        if self.num_labels:
            return super().megatron_args(padded_vocab_size, dtype)
        return checkpoint_args(self.config, padded_vocab_size, dtype)

    def megatron_lm_flags(self, dtype: str) -> list[str]:
        return [] if self.num_labels else megatron_lm_flags(self.config, dtype)
