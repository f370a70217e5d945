"""OLMo-2: the published sizes and the mapping table."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from typing import Any, ClassVar

from megatron_olmo_bridge.mapping.mappings import Mapping
from megatron_olmo_bridge.models.bridge import ModelBridge, register_bridge
from megatron_olmo_bridge.models.config import published
from megatron_olmo_bridge.models.tables import (
    ATTENTION,
    MLP,
    attention,
    embedding,
    gated_mlp,
    norm,
    post_norm,
)

from . import megatron_lm
from .config import Olmo2Config


def _published(*shape: int, vocab: int = 100352) -> dict[str, Any]:
    return published(
        "Olmo2ForCausalLM", *shape, vocab=vocab, eos=100257, pad=100277, model_type="olmo2",
        max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=500000,
    )  # fmt: skip


def olmo2_table(bridge: ModelBridge, padded_vocab_size: int | None) -> list[Mapping]:
    """The table of OLMo-2 and OLMo-3."""
    c = bridge.config
    return [
        embedding(c, padded_vocab_size),
        *attention(c, qk_norm=True),
        post_norm(c, f"{ATTENTION}.linear_proj", "post_attention_layernorm"),
        *gated_mlp(c),
        post_norm(c, f"{MLP}.linear_fc2", "post_feedforward_layernorm"),
        norm(c, "decoder.final_layernorm.", "model.norm."),
    ]


@register_bridge(
    "Olmo2ForCausalLM", "Olmo1124ForCausalLM", "Olmo2ForSequenceClassification", "olmo2",
    "olmo_1124",
)  # fmt: skip
class Olmo2Bridge(ModelBridge):
    """OLMo-2: post-norm blocks, QK norm over the full projection width."""

    family = "olmo2"
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

    def megatron_args(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        if self.num_labels:
            return super().megatron_args(padded_vocab_size, dtype)
        return megatron_lm.checkpoint_args(
            self.config, padded_vocab_size=padded_vocab_size, dtype=dtype
        )

    def megatron_flags(self, padded_vocab_size: int, dtype: str) -> list[str]:
        if self.num_labels:
            return []
        return megatron_lm.megatron_lm_flags(
            self.config, padded_vocab_size=padded_vocab_size, dtype=dtype
        )

    @classmethod
    def hf_config_from_megatron(
        cls, values: MappingABC[str, Any], vocab_size: int | None
    ) -> dict[str, Any]:
        return megatron_lm.config_from_args(values, vocab_size=vocab_size)
