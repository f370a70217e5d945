"""What config.json doesn't say is what transformers takes; what is not of its type is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import (
    FlexOlmoConfig,
    GPT2Config,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    PreTrainedConfig,
)

from megatron_olmo_bridge.errors import MOST_CHARACTERS, BridgeError, InputError
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import FAMILIES, bridge_for, published_sizes

TRANSFORMERS: dict[str, type[PreTrainedConfig]] = {
    "olmo": OlmoConfig,
    "olmo2": Olmo2Config,
    "olmo3": Olmo3Config,
    "olmoe": OlmoeConfig,
    "flex_olmo": FlexOlmoConfig,
    "gpt2": GPT2Config,
}
BRIDGES = {bridge.family: bridge for bridge in published_sizes().values()}


def tiny(family: str) -> dict[str, Any]:
    sizes = BRIDGES[family].sizes
    return sizes[next(name for name in sizes if name.endswith("-tiny"))]


def read(config: dict[str, Any]) -> ModelBridge:
    return bridge_for(config, "folder/config.json")


def test_every_family_is_compared() -> None:
    assert TRANSFORMERS.keys() == FAMILIES.keys() == BRIDGES.keys()


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_default_is_that_of_transformers(family: str) -> None:
    theirs = TRANSFORMERS[family]
    defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
    # Not fields: the one is a class attribute, the other is read by getattr(config, "head_dim").
    defaults |= {"rope_theta": theirs.default_theta, "head_dim": None}
    if family == "olmo":
        defaults["rms_norm_eps"] = 1e-5  # not read
    ours = BRIDGES[family].config_class.hf_defaults
    assert ours == {key: defaults[key] for key in ours}
    assert BRIDGES[family].default_pad_token_id == defaults["pad_token_id"] or family in (
        "flex_olmo",
        "gpt2",  # no classifier
    )


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_alias_is_read(family: str) -> None:
    aliases = BRIDGES[family].config_class.hf_aliases
    assert aliases == TRANSFORMERS[family].attribute_map
    for alias, key in aliases.items():
        config = tiny(family)
        renamed = {alias if k == key else k: v for k, v in config.items()}
        assert read(renamed).config_values == read(config).config_values
        with pytest.raises(InputError, match=f"{key} is {config[key]} and {alias}, .* is 3$"):
            read(config | {alias: 3})


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_bare_config_is_the_model_that_transformers_builds(family: str) -> None:
    bare = {"model_type": family}
    assert read(bare).config_values == read(bare | TRANSFORMERS[family]().to_dict()).config_values


@pytest.mark.parametrize("family", ["olmo", "olmo2", "olmo3"])
def test_a_bare_classifier_pads_and_labels_as_transformers_does(family: str) -> None:
    name = TRANSFORMERS[family].__name__.replace("Config", "ForSequenceClassification")
    config = TRANSFORMERS[family]()
    numbers = read({"architectures": [name]}).config_values
    assert (numbers["pad_token_id"], numbers["num_labels"]) == (
        config.pad_token_id,
        config.num_labels,
    )
    assert (
        read({"architectures": [name], "pad_token_id": None}).config_values["pad_token_id"] is None
    )


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", ["x" * 100_000, ["x" * 100_000], {"rope_type": "x" * 100_000}])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_message_about_a_long_value_fits_a_screen(family: str, value: Any) -> None:
    refused = 0
    for key in [*TRANSFORMERS[family]().to_dict(), "rope_parameters", "rope_scaling", "model_type"]:
        try:
            read(tiny(family) | {key: value})
        except BridgeError as error:
            refused += 1
            assert len(str(error)) < MOST_CHARACTERS + 100, key
    assert refused > 5


NAN, INFINITY = float("nan"), float("inf")
WRONG: dict[type, list[Any]] = {
    bool: ["false", "true", 0, 1, 0.0, None, []],
    int: ["8", 8.0, 0, -8, True, None, NAN, [8]],
    float: ["0.5", -1.0, True, None, NAN, INFINITY, {}],
    str: [3, None, True, ["silu"]],
}
WRONG_OR_NULL = {
    "num_key_value_heads": ["8", 8.0, 0, -8, True],
    "head_dim": ["8", 8.0, 0, -8, True],
    "n_inner": ["8", 8.0, 0, -8, True],
    "clip_qkv": ["8", 0, -8.0, True, NAN, INFINITY],
    "layer_types": ["full_attention", 4, {}, [1, 2, 3, 4], [None] * 4, []],
}


def wrong_values() -> list[tuple[str, str, Any]]:
    return [
        (family, key, value)
        for family, bridge in BRIDGES.items()
        for key, default in bridge.config_class.hf_defaults.items()
        for value in (WRONG_OR_NULL[key] if default is None else WRONG[type(default)])
    ]


@pytest.mark.parametrize(("family", "key", "value"), wrong_values())
def test_a_value_of_another_type_is_refused_by_name(family: str, key: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read(tiny(family) | {key: value})
    assert str(caught.value).startswith(f"folder/config.json: {key} must be ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_labels", "3"),
        ("num_labels", None),
        ("num_labels", 2.0),
        ("id2label", ["a", "b"]),
        ("id2label", "ab"),
        ("pad_token_id", "1"),
        ("pad_token_id", True),
    ],
)
def test_a_classifiers_value_of_another_type_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"folder/config\.json: {key} must be "):
        read({"architectures": ["Olmo2ForSequenceClassification"], key: value})


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_parameters": []}, "rope_parameters must be an object or null, not []"),
        ({"rope_scaling": "yarn"}, 'rope_scaling must be an object or null, not "yarn"'),
        ({"rope_parameters": {"rope_theta": "1e4"}},
         'rope_theta in rope_parameters must be a number above 0, not "1e4"'),
        ({"rope_parameters": {"rope_theta": None}},
         "rope_theta in rope_parameters must be a number above 0, not null"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type in rope_parameters must be a string"),
        ({"rope_scaling": {"type": None}}, "rope_type in rope_scaling must be a string, not null"),
        ({"rope_parameters": {"full_attention": {"rope_theta": NAN},
                              "sliding_attention": {"rope_theta": 1e4}}},
         "rope_theta in rope_parameters.full_attention must be a number above 0, not NaN"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", [name for name in TRANSFORMERS if name != "gpt2"])
def test_a_rope_value_of_another_type_is_refused_by_name(
    family: str, rope: dict[str, Any], says: str
) -> None:
    plain = {k: v for k, v in tiny(family).items() if not k.startswith("rope_")}
    with pytest.raises(InputError) as caught:
        read(plain | rope)
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings", "beta_fast"])
@pytest.mark.parametrize("value", ["8", None, -1, 0, True, NAN])
def test_a_yarn_value_of_another_type_is_refused_by_name(key: str, value: Any) -> None:
    config = tiny("olmo3")
    with pytest.raises(InputError, match=f"{key} of YaRN must be "):
        read(config | {"rope_scaling": config["rope_scaling"] | {key: value}})


def test_a_whole_number_beyond_floats_is_refused() -> None:
    with pytest.raises(InputError, match="must be a number above 0, not 1000") as caught:
        read(tiny("olmo2") | {"rms_norm_eps": 10**400})
    assert len(str(caught.value)) < 400


def positive_numbers() -> list[tuple[str, str]]:
    return [
        (family, key)
        for family, bridge in BRIDGES.items()
        for key, default in bridge.config_class.hf_defaults.items()
        if isinstance(default, float) and key != "router_aux_loss_coef"
    ]


@pytest.mark.parametrize(("family", "key"), positive_numbers())
def test_theta_and_eps_are_above_zero(family: str, key: str) -> None:
    for zero in (0, 0.0, -0.0):
        with pytest.raises(InputError, match=f"{key} must be a number above 0, not"):
            read(tiny(family) | {key: zero})


def test_a_number_may_be_zero_where_zero_means_something() -> None:
    numbers = read(tiny("olmoe") | {"router_aux_loss_coef": 0.0}).config_values
    assert numbers["moe_aux_loss_coeff"] == 0.0


MOST = {
    "num_hidden_layers": 100_000,
    "n_layer": 100_000,
    "num_experts": 4096,
    "num_attention_heads": 4096,
    "n_head": 4096,
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_huge_count_is_refused_before_anything_is_built(family: str) -> None:
    defaults = BRIDGES[family].config_class.hf_defaults
    for key in (key for key, default in defaults.items() if type(default) is int):
        most = MOST.get(key, 2**31 - 1)
        for count in (most + 1, 10**15, 10**900):
            with pytest.raises(InputError) as caught:
                read({"model_type": family, key: count})
            said = f"{key} must be a positive whole number of at most {most:,}, not {count}"
            assert str(caught.value)[len("folder/config.json: ") :][:200] == said[:200]


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"full_attention": {"rope_theta": 1e4}}, "rope_parameters lacks sliding_attention"),
        ({"sliding_attention": {"rope_theta": 1e4}}, "rope_parameters lacks full_attention"),
        ({"full_attention": {"rope_theta": 1e4}, "sliding_attention": None}, "some of both"),
        ({"full_attention": {"rope_theta": 1e4}, "rope_theta": 1e4}, "some of both"),
    ],
)
def test_a_rope_that_is_missing_is_not_made_up(rope: dict[str, Any], says: str) -> None:
    config = tiny("olmo3") | {"rope_scaling": None, "rope_parameters": rope}
    with pytest.raises(InputError, match=says):
        read(config)
