"""Config of an OLMo-3 model: windows, and a rope for each layer type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_olmo_bridge.errors import InputError, UnsupportedError, quote
from megatron_olmo_bridge.models.config import DecoderConfig, Rope, ropes
from megatron_olmo_bridge.models.hf_values import HFValues, shown

SLIDING, FULL = "sliding_attention", "full_attention"
EVERY = 4
"""Every Nth layer has no window, unless the config has ``layer_types``."""
THETA = 500000.0
"""Default rope theta of transformers' Olmo3Config."""


@dataclass(frozen=True)
class Olmo3Config(DecoderConfig):
    """Config of OLMo-2 with windows; ``rotary_base`` is for the layers that have one."""

    label = "OLMo-3"
    hf_defaults: ClassVar[dict[str, Any]] = DecoderConfig.hf_defaults | {
        "rope_theta": THETA,
        "sliding_window": 4096,
        "layer_types": None,
    }

    window_size: tuple[int, int] | None = None
    """Number of tokens that a query sees before and after itself; None without windows."""
    window_attn_skip_freq: int | list[int] | None = None
    """N if every Nth layer has no window; otherwise 1 or 0 for each layer with or without one."""
    full_attention_rope: dict[str, Any] | None = None
    """YaRN parameters of the layers without a window; None if they use the same rope."""

    @classmethod
    def read(cls, hf: HFValues) -> dict[str, Any]:
        decoder = super().read(hf)
        layers = decoder["num_layers"]
        types = _read_layer_types(hf, layers)
        by_type = ropes(hf)
        if missing := [kind for kind in types if kind not in by_type and "" not in by_type]:
            raise InputError(f"rope_parameters lacks {missing[0]}, which some of the layers are")
        has_window = [int(kind == SLIDING) for kind in types]
        return decoder | {
            "window_size": (hf.count("sliding_window") - 1, 0) if SLIDING in types else None,
            "window_attn_skip_freq": EVERY if types == layer_types(layers) else has_window,
            "full_attention_rope": _full_attention_rope(hf, decoder),
        }

    @classmethod
    def read_theta(cls, hf: HFValues) -> float:
        rope = _rope_of(hf, SLIDING)
        if len(ropes(hf)) > 1 and rope["rope_type"] != "default":
            raise UnsupportedError(
                f"the config asks for rope of type {quote(rope['rope_type'])} in layers with a "
                "window; OLMo-3 has plain rope there"
            )
        return float(rope["rope_theta"])


def layer_types(layers: int) -> list[str]:
    """Return the published layer types, which are also transformers' default."""
    return [SLIDING if (i + 1) % EVERY else FULL for i in range(layers)]


def rope_notes(config: dict[str, Any]) -> list[str]:
    """Return notes on rope values that some version of transformers reads differently."""
    notes = []
    hf = HFValues(config, Olmo3Config.hf_defaults)
    by_type = ropes(hf)
    if (
        hf.table("rope_parameters")
        and len(by_type) == 1
        and (by_type.get("", {}).get("rope_type") != "default")
    ):
        notes.append(
            "rope_parameters is not nested by layer type: read as OLMo-3 was trained, with YaRN in "
            "full-attention layers only; transformers 5.23 drops YaRN, 5.0 to 5.12 apply it in "
            "every layer"
        )
    if not hf.table("rope_parameters") and hf.number("rope_theta") != THETA:
        notes.append(
            f"rope_theta {hf.number('rope_theta'):g} is taken for all layers; transformers 5 takes "
            f"{THETA:g} in those with a window"
        )
    return notes


def _read_layer_types(hf: HFValues, layers: int) -> list[str]:
    types = hf.get("layer_types")
    types = layer_types(layers) if types is None else types
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(kind not in (SLIDING, FULL) for kind in types)
    ):
        raise InputError(
            f"layer_types must be a list that says {SLIDING!r} or {FULL!r} of each of {layers} "
            f"layers, not {shown(types)}"
        )
    return types


def _rope_of(hf: HFValues, kind: str) -> Rope:
    by_type = ropes(hf)
    plain = {"rope_type": "default", "rope_theta": hf.number("rope_theta")}
    return by_type[kind] if kind in by_type else by_type.get("", plain)


def _full_attention_rope(hf: HFValues, decoder: dict[str, Any]) -> dict[str, Any] | None:
    """Return YaRN parameters of the layers without a window; ``decoder`` has the base fields."""
    rope = _rope_of(hf, FULL)
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    if kind not in ("default", "yarn"):
        raise UnsupportedError(
            f"the config asks for rope of type {quote(kind)}; OLMo-3 uses plain rope and YaRN"
        )
    if kind == "default":
        if theta == decoder["rotary_base"]:
            return None
        rope = {"factor": 1.0}  # YaRN that changes nothing
    odd = [key for key in ("mscale", "mscale_all_dim", "truncate") if rope.get(key) is not None]
    if odd:
        raise UnsupportedError(f"the config sets {', '.join(odd)} of YaRN; OLMo-3 has the defaults")
    # Defaults of transformers (modeling_rope_utils.py).
    defaults = {
        "original_max_position_embeddings": decoder["max_position_embeddings"],
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
    }
    yarn = HFValues(rope, defaults, where=" of YaRN")
    factor = yarn.number("factor")
    # The YaRN paper's.
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "rotary_base": theta,
        "scaling_factor": factor,
        "original_max_position_embeddings": yarn.count("original_max_position_embeddings"),
        "beta_fast": yarn.number("beta_fast"),
        "beta_slow": yarn.number("beta_slow"),
        "attention_factor": yarn.optional_number("attention_factor") or usual,
    }
