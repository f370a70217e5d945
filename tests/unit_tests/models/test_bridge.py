"""Finding the family of a config.json."""

from typing import Any

import pytest

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models.bridge import bridge_for, known_architectures, published_sizes
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge

NUMBERS = {key: value for key, value in Olmo2Bridge.sizes["olmo2-tiny"].items()
           if key not in ("architectures", "model_type")}  # fmt: skip


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
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({}, "model_type None"),
    ],
)
def test_an_unknown_architecture_is_refused_with_those_known(
    says: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        bridge_for(NUMBERS | says, "folder/config.json")
    assert str(caught.value) == (
        f"folder/config.json: architecture {named} is not known here. "
        f"Known are: {', '.join(known_architectures())}."
    )


def test_known_architectures_and_published_sizes() -> None:
    assert "Olmo2ForCausalLM" in known_architectures()
    assert [name for name, bridge in published_sizes().items() if bridge is Olmo2Bridge] == [
        "olmo2-tiny", "olmo2-1b", "olmo2-7b", "olmo2-13b", "olmo2-32b",
    ]  # fmt: skip
