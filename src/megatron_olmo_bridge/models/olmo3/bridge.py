"""OLMo-3 and 3.1: the published sizes; the table is OLMo-2's."""

from __future__ import annotations

from typing import Any, ClassVar

from megatron_olmo_bridge.models.bridge import DecoderBridge
from megatron_olmo_bridge.models.config import published
from megatron_olmo_bridge.models.olmo2.bridge import olmo2_table

from .config import Olmo3Config, layer_types, rope_notes


def _published(
    layers: int, *shape: int, vocab: int = 100278, window: int = 4096, original: int = 8192
) -> dict[str, Any]:
    return published(
        "Olmo3ForCausalLM",
        layers,
        *shape,
        vocab=vocab,
        eos=100257,
        pad=100277,
        model_type="olmo3",
        max_position_embeddings=8 * original,
        rms_norm_eps=1e-6,
        rope_theta=500000,
        sliding_window=window,
        layer_types=layer_types(layers),
        rope_scaling={
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": original,
            "rope_type": "yarn",
        },
    )


class Olmo3Bridge(DecoderBridge):
    """OLMo-3: OLMo-2 with windows, and YaRN in the layers without one."""

    family = "olmo3"
    architectures = ("Olmo3ForCausalLM", "Olmo3ForSequenceClassification", "olmo3")
    hf_base = "Olmo3Model"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "olmo3-tiny": _published(4, 128, 8, 4, 384, vocab=1022, window=16, original=32),
        "olmo3-7b": _published(32, 4096, 32, 32, 11008),
        "olmo3-32b": _published(64, 5120, 40, 8, 27648),
        # Olmo 3.1 is Olmo 3 after more post-training, in the same shapes.
        "olmo3.1-7b": _published(32, 4096, 32, 32, 11008),
        "olmo3.1-32b": _published(64, 5120, 40, 8, 27648),
    }
    config_class = Olmo3Config
    provider_class = "megatron_olmo_bridge.models.olmo3.provider:Olmo3ModelProvider"
    table = olmo2_table

    @classmethod
    def with_layers(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return {**config, "num_hidden_layers": layers, "layer_types": layer_types(layers)}

    @property
    def notes(self) -> list[str]:
        return rope_notes(self.hf_config)
