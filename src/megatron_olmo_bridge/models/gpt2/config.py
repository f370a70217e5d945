"""Config of a GPT-2 model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megatron_olmo_bridge.errors import InputError, UnsupportedError, quote
from megatron_olmo_bridge.models.hf_values import MAX_HEADS, MAX_LAYERS, HFValues

ACTIVATIONS = ("gelu_new", "gelu")
_ONLY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
"""Flags that have one value in every published GPT-2: transformers' default."""


@dataclass(frozen=True)
class GPT2Config:
    """Values that fix the shapes and the arithmetic of a GPT-2 model.

    Field names are megatron-core's; :meth:`from_hf` reads them from a ``config.json``.
    """

    hf_defaults: ClassVar[dict[str, Any]] = {
        "n_layer": 12,
        "n_embd": 768,
        "n_inner": None,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": ACTIVATIONS[0],
        "tie_word_embeddings": True,
        **_ONLY,
    }
    """The keys of ``config.json`` that are read, with the defaults of transformers' GPT2Config."""
    hf_aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    """Other names of keys: ``attribute_map`` of transformers' GPT2Config."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face model, before any padding."""
    max_position_embeddings: int
    """Rows of the embedding of positions."""
    layernorm_epsilon: float
    activation: str
    """``gelu_new`` (by tanh) or ``gelu`` (exact)."""
    share_embeddings_and_output_weights: bool = True

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """Read a ``config.json``; absent values get the defaults of transformers' GPT2Config.

        Raises:
            InputError: a value is not of its type or range, or the heads don't divide the width.
            UnsupportedError: the config asks for arithmetic that isn't GPT-2's.
        """
        values = HFValues(hf, cls.hf_defaults, cls.hf_aliases)
        for key, usual in _ONLY.items():
            if (value := values.flag(key)) != usual:
                raise UnsupportedError(f"the config sets {key}={value}; GPT-2 has {usual}")
        activation = values.text("activation_function")
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"the config sets activation_function={quote(activation)}; GPT-2 has one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        hidden, heads = values.count("n_embd"), values.count("n_head", MAX_HEADS)
        if hidden % heads:
            raise InputError(f"n_embd {hidden} cannot be divided by {heads} attention heads")
        return cls(
            num_layers=values.count("n_layer", MAX_LAYERS),
            hidden_size=hidden,
            ffn_hidden_size=values.optional_count("n_inner") or 4 * hidden,
            num_attention_heads=heads,
            kv_channels=hidden // heads,
            vocab_size=values.count("vocab_size"),
            max_position_embeddings=values.count("n_positions"),
            layernorm_epsilon=values.number("layer_norm_epsilon"),
            activation=activation,
            share_embeddings_and_output_weights=values.flag("tie_word_embeddings"),
        )
