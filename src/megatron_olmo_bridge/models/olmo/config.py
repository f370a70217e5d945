"""The numbers of an OLMo model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.models.config import HF_KEYS, DecoderConfig

OLMO_HF_KEYS = HF_KEYS | {"clip_qkv"}


@dataclass(frozen=True)
class OlmoConfig(DecoderConfig):
    """Its norms have no weights, and an epsilon of 1e-5 that no config says."""

    label = "OLMo"

    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this."""

    @classmethod
    def read(cls, hf: dict[str, Any]) -> dict[str, Any]:
        return super().read(hf) | {"layernorm_epsilon": 1e-5, "clip_qkv": hf.get("clip_qkv")}
