"""Config of an OLMoE model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_olmo_bridge.models.config import MoEConfig
from megatron_olmo_bridge.models.hf_values import HFValues


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
