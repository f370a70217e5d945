"""Finding the family of a config.json."""

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.families import (
    as_classifier,
    bridge_for,
    known_architectures,
    published_sizes,
)
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge

NUMBERS = {
    key: value
    for key, value in Olmo2Bridge.sizes["olmo2-tiny"].items()
    if key not in ("architectures", "model_type")
}


@pytest.mark.parametrize(
    "says",
    [
        {"architectures": ["Olmo2ForCausalLM"]},
        {"architectures": ["Olmo1124ForCausalLM"]},
        {"architectures": ["MyOwnForCausalLM", "Olmo2ForCausalLM"]},
        {"model_type": "olmo2"},
        {"model_type": "olmo_1124"},
        {"architectures": None, "model_type": "olmo2"},
        {"architectures": [], "model_type": "olmo2"},
        {"architectures": ["FSDPOlmo2ForCausalLM"], "model_type": "olmo2"},
        {"architectures": ["Olmo2Model"], "model_type": "olmo2"},
        {"architectures": ["MyOlmo2ForSequenceClassification"], "model_type": "olmo2"},
    ],
)
def test_olmo2_by_any_of_its_names(says: dict[str, Any]) -> None:
    assert type(bridge_for(NUMBERS | says, "config.json")) is Olmo2Bridge


@pytest.mark.parametrize(
    ("says", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        # The architecture is what the weights are of; a model_type doesn't overrule it.
        ({"architectures": ["Olmo2ForReward"], "model_type": "olmo2"}, "Olmo2ForReward"),
        ({"architectures": ["Olmo2ForTokenClassification"], "model_type": "olmo2"},
         "Olmo2ForTokenClassification"),
        ({"architectures": ["FSDPOlmo2ForCausalLM"]}, "FSDPOlmo2ForCausalLM"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({}, "model_type None"),
    ],
)  # fmt: skip
def test_an_unknown_architecture_is_refused_with_those_known(
    says: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        bridge_for(NUMBERS | says, "folder/config.json")
    assert str(caught.value) == (
        f"folder/config.json: architecture {named} is not known here. "
        f"Known are: {', '.join(known_architectures())}."
    )


@pytest.mark.parametrize("model_type", ["olmo3", "llama", "", 2, ["olmo2"]])
def test_a_model_type_that_is_not_the_architectures_is_refused(model_type: Any) -> None:
    config = NUMBERS | {"architectures": ["Olmo2ForCausalLM"], "model_type": model_type}
    with pytest.raises(InputError) as caught:
        bridge_for(config, "x")
    assert str(caught.value) == (
        "x: architectures Olmo2ForCausalLM are of olmo2, but model_type "
        f"{model_type!r} is not: correct one of them"
    )


def test_a_prefix_does_not_hide_a_classifier() -> None:
    says = {"architectures": ["FSDPOlmo2ForSequenceClassification"], "model_type": "olmo2"}
    assert bridge_for(NUMBERS | says, "config.json").num_labels == 2


def test_an_architecture_may_be_a_string() -> None:
    config = NUMBERS | {"architectures": "Olmo2ForSequenceClassification"}
    assert bridge_for(config, "x").num_labels == 2


@pytest.mark.parametrize("labels", [0, -1, 100_001, 10**12])
def test_a_head_of_too_many_classes_is_refused(labels: int) -> None:
    config = NUMBERS | {"architectures": ["Olmo2ForCausalLM"]}
    with pytest.raises(InputError, match=f"a head can have 1 to 100,000 classes, not {labels}"):
        as_classifier(config, labels)


@pytest.mark.parametrize(
    "names", [{"Olmo2ForCausalLM": 1}, [["Olmo2ForCausalLM"]], [1], 3, 0, False]
)
def test_architectures_that_are_not_names_are_refused(names: object) -> None:
    with pytest.raises(InputError, match=r"x: architectures must be a list of names, not"):
        bridge_for(NUMBERS | {"architectures": names, "model_type": "olmo2"}, "x")


def test_known_architectures_and_published_sizes() -> None:
    assert "Olmo2ForCausalLM" in known_architectures()
    assert [name for name, bridge in published_sizes().items() if bridge is Olmo2Bridge] == [
        "olmo2-tiny",
        "olmo2-1b",
        "olmo2-7b",
        "olmo2-13b",
        "olmo2-32b",
    ]
