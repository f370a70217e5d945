"""The numbers of a decoder, in megatron-core's terms, read from a Hugging Face config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megatron_olmo_bridge.errors import InputError, UnsupportedError

HF_KEYS = frozenset(
    {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
     "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
     "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias",
     "hidden_act"}
)  # fmt: skip
"""Keys of ``config.json`` that :meth:`DecoderConfig.read` reads."""

Rope = dict[str, Any]
"""``rope_theta``, ``rope_type`` and what belongs to the type, as transformers 5 spells it."""


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers that fix the shapes and the arithmetic of a model of OLMo's families.

    Field names are megatron-core's; :meth:`from_hf` reads them from a ``config.json``.
    """

    label: ClassVar[str]
    """The family's name in messages."""

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
            check_count(name, getattr(self, name))
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"{self.num_attention_heads} attention heads cannot be shared out evenly over "
                f"{self.num_query_groups} key/value heads"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """Read a ``config.json``; absent values get the defaults of transformers' config class.

        Raises:
            InputError: a value is missing, or the head counts don't divide.
            UnsupportedError: the config asks for arithmetic that the family doesn't have.
        """
        return cls(**cls.read(hf))

    @classmethod
    def read(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """The fields' values. A family with fields of its own adds them."""
        need(hf, ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                  "vocab_size"))  # fmt: skip
        if hf.get("attention_bias"):
            raise UnsupportedError(
                f"the config sets attention_bias; published {cls.label} models have none"
            )
        if hf.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(
                f"the config sets hidden_act={hf['hidden_act']!r}; {cls.label} uses silu"
            )
        hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
        check_count("hidden_size", hidden)
        check_count("num_attention_heads", heads)
        if not hf.get("head_dim") and hidden % heads:
            raise InputError(f"hidden_size {hidden} cannot be divided by {heads} attention heads")
        return {
            "num_layers": hf["num_hidden_layers"],
            "hidden_size": hidden,
            "ffn_hidden_size": hf["intermediate_size"],
            "num_attention_heads": heads,
            "num_query_groups": hf.get("num_key_value_heads") or heads,
            "kv_channels": hf.get("head_dim") or hidden // heads,
            "vocab_size": hf["vocab_size"],
            "max_position_embeddings": hf.get("max_position_embeddings", 2048),
            "layernorm_epsilon": float(hf.get("rms_norm_eps", 1e-5)),
            "rotary_base": cls.read_theta(hf),
            "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings", False)),
        }

    @classmethod
    def read_theta(cls, hf: dict[str, Any]) -> float:
        """Theta of a model with one plain rope."""
        rope, *others = ropes(hf).values()
        if any(other != rope for other in others):
            raise UnsupportedError(
                f"the config asks for another rope in each of {', '.join(ropes(hf))}; {cls.label} "
                "has one"
            )
        if rope["rope_type"] != "default":
            raise UnsupportedError(
                f"the config asks for rope of type {rope['rope_type']!r}; {cls.label} uses plain "
                "rope"
            )
        return float(rope.get("rope_theta") or 10000.0)


def published(
    architecture: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    *,
    vocab: int,
    eos: int,
    pad: int,
    **own: Any,
) -> dict[str, Any]:
    """A ``config.json`` as released checkpoints have it; ``own`` is what the family adds."""
    return {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos if eos < vocab else None,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": pad if pad < vocab else None,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
        **own,
    }


def ropes(hf: dict[str, Any]) -> dict[str, Rope]:
    """The rope of each layer type, or of all under the key ``""``, from any of three spellings:
    ``rope_theta`` with ``rope_scaling``, ``rope_parameters``, or these nested by layer type."""
    parameters = hf.get("rope_parameters") or {}
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        return {kind: _rope(value, hf) for kind, value in parameters.items()}
    return {"": _rope({**(hf.get("rope_scaling") or {}), **parameters}, hf)}


def _rope(values: Rope, hf: dict[str, Any]) -> Rope:
    kind = values.get("rope_type") or values.get("type") or "default"
    theta = values.get("rope_theta") or hf.get("rope_theta")
    return {**values, "rope_type": kind, **({"rope_theta": theta} if theta else {})}


def need(hf: dict[str, Any], keys: Iterable[str]) -> None:
    """Raise InputError for keys that are absent."""
    missing = [key for key in keys if hf.get(key) is None]
    if missing:
        raise InputError(f"the config lacks {', '.join(missing)}")


def check_count(name: str, value: object) -> None:
    """Raise InputError unless it is a positive whole number."""
    if type(value) is not int or value < 1:
        raise InputError(f"the model's {name} must be a positive whole number, not {value!r}")
