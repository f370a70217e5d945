"""The numbers of an OLMo-3 model: windows, and a rope for each layer type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.config import HF_KEYS, DecoderConfig, Rope, need, ropes

OLMO3_HF_KEYS = HF_KEYS | {"layer_types", "sliding_window"}
SLIDING, FULL = "sliding_attention", "full_attention"
EVERY = 4
"""One of so many layers has no window, where a config doesn't say which."""
THETA = 500000.0
"""Of transformers' Olmo3Config, where a config says none."""


@dataclass(frozen=True)
class Olmo3Config(DecoderConfig):
    """As OLMo-2, with windows; ``rotary_base`` is of the layers that have one."""

    label = "OLMo-3"

    window_size: tuple[int, int] | None = None
    """Tokens before and after a query that it sees; None if no layer has a window."""
    window_attn_skip_freq: int | list[int] | None = None
    """Every so many layers one without a window; or of each layer, whether it has one."""
    full_attention_rope: dict[str, Any] | None = None
    """YaRN of the layers without a window; None for the same rope as the others."""

    @classmethod
    def read(cls, hf: dict[str, Any]) -> dict[str, Any]:
        found = super().read(hf)
        windowed = _windowed(hf, found["num_layers"])
        window = hf.get("sliding_window", 4096)
        usual = windowed == _windowed({}, len(windowed))
        if any(windowed) and (type(window) is not int or window < 1):
            raise InputError(f"sliding_window must be a positive whole number, not {window!r}")
        return found | {
            "window_size": (window - 1, 0) if any(windowed) else None,
            "window_attn_skip_freq": EVERY if usual else [int(w) for w in windowed],
            "full_attention_rope": _full_attention_rope(hf, found["rotary_base"]),
        }

    @classmethod
    def read_theta(cls, hf: dict[str, Any]) -> float:
        rope = _rope_of(hf, SLIDING)
        if len(ropes(hf)) > 1 and rope["rope_type"] != "default":
            raise UnsupportedError(
                f"the config asks for rope of type {rope['rope_type']!r} in layers with a window; "
                "OLMo-3 has plain rope there"
            )
        return float(rope.get("rope_theta") or THETA)


def layer_types(layers: int) -> list[str]:
    """As published, and transformers' default."""
    return [SLIDING if (i + 1) % EVERY else FULL for i in range(layers)]


def rope_notes(hf: dict[str, Any]) -> list[str]:
    """What some version of transformers would read otherwise from this spelling of rope."""
    notes = []
    found = ropes(hf)
    flat = bool(hf.get("rope_parameters")) and len(found) == 1
    if flat and found.get("", {}).get("rope_type") != "default":
        notes.append(
            "rope_parameters is not nested by layer type: read here as OLMo-3 was trained, YaRN in "
            "full-attention layers alone; transformers 5.23 drops YaRN, 5.0 to 5.12 have it in "
            "every layer"
        )
    if not hf.get("rope_parameters") and float(hf.get("rope_theta") or THETA) != THETA:
        notes.append(
            f"rope_theta {hf['rope_theta']:g} is taken for all layers; transformers 5 takes "
            f"{THETA:g} in those with a window"
        )
    return notes


def _windowed(hf: dict[str, Any], layers: int) -> list[bool]:
    kinds = hf.get("layer_types") or layer_types(layers)
    if len(kinds) != layers or set(kinds) - {SLIDING, FULL}:
        raise InputError(
            f"layer_types must say {SLIDING!r} or {FULL!r} of each of {layers} layers, "
            f"not {', '.join(map(str, kinds))}"
        )
    return [kind == SLIDING for kind in kinds]


def _rope_of(hf: dict[str, Any], kind: str) -> Rope:
    found = ropes(hf)
    return found[kind] if kind in found else found.get("", {"rope_type": "default"})


def _full_attention_rope(hf: dict[str, Any], sliding_theta: float) -> dict[str, Any] | None:
    rope = _rope_of(hf, FULL)
    kind, theta = rope["rope_type"], float(rope.get("rope_theta") or THETA)
    if kind not in ("default", "yarn"):
        raise UnsupportedError(
            f"the config asks for rope of type {kind!r}; OLMo-3 uses plain rope and YaRN"
        )
    if kind == "default":
        if theta == sliding_theta:
            return None
        rope = {
            "factor": 1.0,
            "original_max_position_embeddings": 4096,
        }  # YaRN that changes nothing
    need(rope, ("factor", "original_max_position_embeddings"))
    odd = [key for key in ("mscale", "mscale_all_dim", "truncate") if rope.get(key) is not None]
    if odd:
        raise UnsupportedError(f"the config sets {', '.join(odd)} of YaRN; OLMo-3 has the defaults")
    factor = float(rope["factor"])
    # The YaRN paper's, as transformers computes it where the config doesn't say.
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "rotary_base": theta,
        "scaling_factor": factor,
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": float(rope.get("beta_fast") or 32.0),
        "beta_slow": float(rope.get("beta_slow") or 1.0),
        "attention_factor": float(rope.get("attention_factor") or usual),
    }
