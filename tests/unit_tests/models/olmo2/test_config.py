"""Olmo2Config.from_hf: what a config.json means, and what it is refused for."""

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.olmo2.config import Olmo2Config

# Every number differs from the others, so that none can be read from another's key unnoticed.
CONFIG: dict[str, Any] = {
    "model_type": "olmo2",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 250,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name not in names}


def test_every_value_is_read() -> None:
    assert Olmo2Config.from_hf(CONFIG) == Olmo2Config(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=160,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=250,
        max_position_embeddings=4096,
        layernorm_epsilon=1e-6,
        rotary_base=500000.0,
        share_embeddings_and_output_weights=False,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 500000.0}},
        # transformers 5 writes the one, and leaves the other where it was read
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "rope_theta": 10000},
        {"rope_parameters": None, "rope_theta": 500000},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 500000},
    ],
)
def test_every_spelling_of_rope_is_read(rope: dict[str, Any]) -> None:
    config = Olmo2Config.from_hf(without("rope_theta", "rope_scaling") | rope)

    assert config.rotary_base == 500000.0
    assert isinstance(config.rotary_base, float)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0}},
    ],
)
def test_refuses_scaled_rope(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"rope of type '(yarn|linear)'"):
        Olmo2Config.from_hf(CONFIG | rope)


def test_head_dim_may_differ_from_hidden_size_over_heads() -> None:
    assert Olmo2Config.from_hf(CONFIG | {"head_dim": 16}).kv_channels == 16
    assert Olmo2Config.from_hf(CONFIG | {"head_dim": None}).kv_channels == 8


def test_tied_embeddings() -> None:
    config = Olmo2Config.from_hf(CONFIG | {"tie_word_embeddings": True})

    assert config.share_embeddings_and_output_weights is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_refuses_other_arithmetic(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        Olmo2Config.from_hf(CONFIG | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 60}, "60 cannot be divided by 8 attention heads"),
        ({"num_key_value_heads": 3}, "8 attention heads .* 3 key/value heads"),
    ],
)
def test_refuses_invalid_values(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Olmo2Config.from_hf(CONFIG | change)
