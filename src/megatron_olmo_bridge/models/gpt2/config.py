"""The numbers of a GPT-2 model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.config import check_count, need

GPT2_HF_KEYS = frozenset(
    {"n_layer", "n_embd", "n_inner", "n_head", "vocab_size", "n_positions", "layer_norm_epsilon",
     "activation_function", "tie_word_embeddings", "scale_attn_weights",
     "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"}
)  # fmt: skip
ACTIVATIONS = ("gelu_new", "gelu")
_ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
         "reorder_and_upcast_attn": False, "add_cross_attention": False}  # fmt: skip


@dataclass(frozen=True)
class GPT2Config:
    """Field names are megatron-core's; :meth:`from_hf` reads them from a ``config.json``."""

    label: ClassVar[str] = "GPT-2"

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
            InputError: a value is missing, or the heads don't divide the width.
            UnsupportedError: the config asks for arithmetic that isn't GPT-2's.
        """
        need(hf, ("n_layer", "n_embd", "n_head", "vocab_size"))
        for key, usual in _ONLY.items():
            if hf.get(key, usual) != usual:
                raise UnsupportedError(f"the config sets {key}={hf[key]!r}; GPT-2 has {usual}")
        activation = hf.get("activation_function", ACTIVATIONS[0])
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"the config sets activation_function={activation!r}; GPT-2 has one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        for key in ("n_layer", "n_embd", "n_head", "vocab_size"):
            check_count(key, hf[key])
        hidden, heads = hf["n_embd"], hf["n_head"]
        if hidden % heads:
            raise InputError(f"n_embd {hidden} cannot be divided by {heads} attention heads")
        return cls(
            num_layers=hf["n_layer"],
            hidden_size=hidden,
            ffn_hidden_size=hf.get("n_inner") or 4 * hidden,
            num_attention_heads=heads,
            kv_channels=hidden // heads,
            vocab_size=hf["vocab_size"],
            max_position_embeddings=hf.get("n_positions", 1024),
            layernorm_epsilon=float(hf.get("layer_norm_epsilon", 1e-5)),
            activation=activation,
            share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", True)),
        )
