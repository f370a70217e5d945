"""Olmo3Config.from_hf: windows, and the rope of each layer type in three spellings."""

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.olmo3.bridge import Olmo3Bridge
from megatron_olmo_bridge.models.olmo3.config import FULL, SLIDING, Olmo3Config

CONFIG: dict[str, Any] = Olmo3Bridge.sizes["olmo3-7b"]
YARN = CONFIG["rope_scaling"]
READ = {
    "rotary_base": 500000.0,
    "scaling_factor": 8.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.2079441541679836,
}


def spelled(**rope: Any) -> dict[str, Any]:
    """The 7B's config with another spelling of rope."""
    return {k: v for k, v in CONFIG.items() if not k.startswith("rope_")} | rope


NESTED = spelled(
    rope_parameters={
        FULL: {"rope_theta": 500000, **YARN},
        SLIDING: {"rope_theta": 500000, "rope_type": "default"},
    }
)
FLAT = spelled(rope_parameters={"rope_theta": 500000, **YARN})


@pytest.mark.parametrize("config", [CONFIG, NESTED, FLAT], ids=["legacy", "nested", "flat"])
def test_only_layers_without_a_window_have_yarn(config: dict[str, Any]) -> None:
    found = Olmo3Config.from_hf(config)
    assert found.rotary_base == 500000.0
    assert found.full_attention_rope == READ


def test_yarn_without_an_original_length_takes_the_configs() -> None:
    yarn = {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}
    found = Olmo3Config.from_hf(CONFIG | {"rope_scaling": yarn}).full_attention_rope
    assert found == READ | {"original_max_position_embeddings": 65536}


@pytest.mark.parametrize("left_out", [("attention_factor",), ("beta_fast", "beta_slow")])
def test_missing_yarn_values_are_the_papers(left_out: tuple[str, ...]) -> None:
    yarn = {key: value for key, value in YARN.items() if key not in left_out}
    assert Olmo3Config.from_hf(CONFIG | {"rope_scaling": yarn}).full_attention_rope == READ


def test_without_yarn_there_is_one_rope() -> None:
    assert Olmo3Config.from_hf(CONFIG | {"rope_scaling": None}).full_attention_rope is None


def test_each_layer_type_may_have_its_own_theta() -> None:
    config = spelled(
        rope_parameters={
            FULL: {"rope_theta": 7e5, "rope_type": "default"},
            SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
        }
    )
    found = Olmo3Config.from_hf(config)
    assert found.rotary_base == 1e4
    assert found.full_attention_rope is not None
    assert found.full_attention_rope["rotary_base"] == 7e5
    # YaRN that changes nothing.
    assert found.full_attention_rope["scaling_factor"] == 1.0
    assert found.full_attention_rope["attention_factor"] == 1.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CONFIG, None),
        (NESTED, None),
        (FLAT, "5.23 drops YaRN"),
        (CONFIG | {"rope_theta": 10000}, "rope_theta 10000 is taken for all layers"),
    ],
    ids=["legacy", "nested", "flat", "another theta"],
)
def test_rope_values_that_transformers_reads_differently_are_noted(
    config: dict[str, Any], says: str | None
) -> None:
    notes = Olmo3Bridge(config).notes
    assert len(notes) == (says is not None)
    assert says is None or says in notes[0]


def test_windows_are_read_by_frequency_or_layer_by_layer() -> None:
    found = Olmo3Config.from_hf(CONFIG)
    assert found.window_size == (4095, 0)  # the token itself is one of 4096
    assert found.window_attn_skip_freq == 4
    unusual = [FULL, *[SLIDING] * 31]
    assert Olmo3Config.from_hf(CONFIG | {"layer_types": unusual}).window_attn_skip_freq == [
        0,
        *[1] * 31,
    ]
    assert Olmo3Config.from_hf(CONFIG | {"layer_types": [FULL] * 32}).window_size is None


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"layer_types": [SLIDING]}, InputError, "layer_types must be a list"),
        ({"layer_types": ["linear_attention"] * 32}, InputError, "linear_attention"),
        ({"sliding_window": None}, InputError, "sliding_window"),
        ({"sliding_window": 0}, InputError, "sliding_window"),
        ({"rope_scaling": {"rope_type": "llama3"}}, UnsupportedError, "llama3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, InputError, "factor of YaRN is missing"),
        ({"rope_scaling": YARN | {"mscale": 2.0}}, UnsupportedError, "mscale"),
        ({"rope_scaling": None,
          "rope_parameters": {SLIDING: {"rope_theta": 1e4, **YARN}, FULL: {"rope_theta": 1e4}}},
         UnsupportedError, "layers with a window"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, InputError, "contradict each"),
    ],
)  # fmt: skip
def test_invalid_configs_are_refused(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Olmo3Config.from_hf(CONFIG | changes)
