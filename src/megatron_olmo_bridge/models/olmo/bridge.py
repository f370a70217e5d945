"""OLMo: the config, the published sizes and the mapping table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron_olmo_bridge.mapping.mappings import Mapping
from megatron_olmo_bridge.models.bridge import DecoderBridge
from megatron_olmo_bridge.models.config import DECODER_SETTINGS, DecoderConfig, published
from megatron_olmo_bridge.models.hf_values import HFValues
from megatron_olmo_bridge.models.tables import attention, embedding, gated_mlp


@dataclass(frozen=True)
class OlmoConfig(DecoderConfig):
    """Config of OLMo; its norms have no weights, and an epsilon of 1e-5 that no config states."""

    label = "OLMo"
    hf_defaults: ClassVar[dict[str, Any]] = DecoderConfig.hf_defaults | {"clip_qkv": None}

    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this."""

    @classmethod
    def read(cls, hf: HFValues) -> dict[str, Any]:
        return super().read(hf) | {
            "layernorm_epsilon": 1e-5,
            "clip_qkv": hf.optional_number("clip_qkv"),
        }


_published = partial(
    published,
    "OlmoForCausalLM",
    vocab=50304,
    eos=50279,
    pad=1,
    model_type="olmo",
    max_position_embeddings=2048,
    rope_theta=10000.0,
    clip_qkv=None,
)


class OlmoBridge(DecoderBridge):
    """OLMo: pre-norm blocks, norms without weights."""

    family = "olmo"
    architectures = ("OlmoForCausalLM", "OlmoForSequenceClassification", "olmo")
    hf_base = "OlmoModel"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "olmo-tiny": _published(4, 128, 8, 4, 384, clip_qkv=0.4, vocab=1024),
        "olmo-1b": _published(16, 2048, 16, 16, 8192, tie_word_embeddings=True),
        "olmo-7b": _published(32, 4096, 32, 32, 11008),
    }
    config_class = OlmoConfig
    provider_class = "megatron_olmo_bridge.models.olmo.provider:OlmoModelProvider"
    settings: ClassVar[dict[str, Any]] = DECODER_SETTINGS | {"normalization": "LayerNorm"}

    def table(self, padded_vocab_size: int | None) -> list[Mapping]:
        c = self.config
        return [embedding(c, padded_vocab_size), *attention(c, qk_norm=False), *gated_mlp(c)]
