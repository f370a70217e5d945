"""Config of an OLMo-2 model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_olmo_bridge.models.config import DecoderConfig


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """Config of OLMo-2, which adds nothing to the decoder's."""

    label = "OLMo-2"
