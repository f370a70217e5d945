"""Config of an OLMo model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_olmo_bridge.models.config import DecoderConfig
from megatron_olmo_bridge.models.hf_values import HFValues


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
