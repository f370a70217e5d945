"""The numbers of an OLMo-2 model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_olmo_bridge.models.config import DecoderConfig


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """As every decoder; nothing of its own."""

    label = "OLMo-2"
