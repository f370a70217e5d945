"""The numbers of an OLMo-2 model, in megatron-core's terms, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.errors import InputError, UnsupportedError

HF_KEYS = frozenset(
    {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
     "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
     "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias",
     "hidden_act"}
)  # fmt: skip
"""Keys of ``config.json`` that :meth:`Olmo2Config.from_hf` reads."""


@dataclass(frozen=True)
class Olmo2Config:
    """The numbers that fix the shapes and the arithmetic of an OLMo-2 model.

    Field names are megatron-core's; :meth:`from_hf` reads them from a ``config.json``.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Rows of gate_proj and of up_proj, each."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; equal to ``num_attention_heads`` without grouped queries."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face model, before any padding."""
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                     "num_query_groups", "kv_channels", "vocab_size"):  # fmt: skip
            _check_count(name, getattr(self, name))
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"{self.num_attention_heads} attention heads cannot be shared out evenly over "
                f"{self.num_query_groups} key/value heads"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Olmo2Config:
        """Read a ``config.json``; absent values get the defaults of transformers' Olmo2Config.

        Raises:
            InputError: a value is missing, or the head counts don't divide.
            UnsupportedError: the config asks for arithmetic that OLMo-2 in Megatron doesn't have.
        """
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                  "vocab_size")  # fmt: skip
        missing = [key for key in needed if hf.get(key) is None]
        if missing:
            raise InputError(f"the config lacks {', '.join(missing)}")
        if hf.get("attention_bias"):
            raise UnsupportedError(
                "the config sets attention_bias; published OLMo-2 models have none"
            )
        if hf.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(
                f"the config sets hidden_act={hf['hidden_act']!r}; OLMo-2 uses silu"
            )
        hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
        _check_count("hidden_size", hidden)
        _check_count("num_attention_heads", heads)
        if not hf.get("head_dim") and hidden % heads:
            raise InputError(f"hidden_size {hidden} cannot be divided by {heads} attention heads")
        return cls(
            num_layers=hf["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=hf.get("num_key_value_heads") or heads,
            kv_channels=hf.get("head_dim") or hidden // heads,
            vocab_size=hf["vocab_size"],
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            layernorm_epsilon=float(hf.get("rms_norm_eps", 1e-5)),
            rotary_base=_rope_theta(hf),
            share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", False)),
        )


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise InputError(f"the model's {name} must be a positive whole number, not {value!r}")


def _rope_theta(hf: dict[str, Any]) -> float:
    """Theta from any spelling: legacy ``rope_theta``, ``rope_parameters``, or these nested by layer
    type."""
    rope = hf.get("rope_parameters") or {}
    if rope and all(isinstance(value, dict) for value in rope.values()):
        kinds = list(rope.values())
        if any(kind != kinds[0] for kind in kinds):
            raise UnsupportedError(
                f"the config asks for another rope in each of {', '.join(rope)}; OLMo-2 has one"
            )
        rope = kinds[0]
    scaling = hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise UnsupportedError(f"the config asks for rope of type {kind!r}; OLMo-2 uses plain rope")
    return float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
