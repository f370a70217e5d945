"""What every family says of itself: sizes, numbers, mapping, provider."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models import families
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.catalogue import catalogue, markdown
from megatron_olmo_bridge.models.families import (
    as_classifier,
    bridge_for,
    known_architectures,
    published_sizes,
)

PARAMETERS = {
    "olmo-1b": 1_176_764_416,
    "olmo-7b": 6_888_095_744,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "olmo3.1-7b": 7_298_011_136,
    "olmo3.1-32b": 32_233_522_176,
    "olmoe-1b-7b": 6_919_161_856,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
}
TINY = [name for name in published_sizes() if name.endswith("-tiny")]


def bridge(size: str, **changes: Any) -> ModelBridge:
    return bridge_for(published_sizes()[size].sizes[size] | changes, "config.json")


def test_each_folder_is_a_family_by_its_line_in_the_list() -> None:
    folder = Path(families.__file__).parent
    assert {file.parent.name for file in folder.glob("*/bridge.py")} == families.FAMILIES.keys()
    assert [bridge.family for bridge in families.bridges()] == list(families.FAMILIES)


def test_no_two_families_handle_the_same_architecture() -> None:
    names = [name for bridge in families.bridges() for name in bridge.architectures]
    assert names == known_architectures()


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_sizes_have_the_published_parameters(size: str) -> None:
    shapes = bridge(size).mapping_registry().resolve().hf_shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[size]


@pytest.mark.parametrize("size", TINY)
def test_the_number_of_layers_can_be_changed(size: str) -> None:
    kind = published_sizes()[size]
    assert kind(kind.with_layers(kind.sizes[size], 7)).num_layers == 7


@pytest.mark.parametrize("size", TINY)
def test_the_providers_values_are_the_configs(size: str) -> None:
    pytest.importorskip("megatron.core")
    family = bridge(size)
    provider = family.provider(params_dtype=__import__("torch").float32)
    assert {name: getattr(provider, name) for name in family.config_values} == family.config_values
    module, _, name = family.run_config_model(1024, "float32")["_target_"].rpartition(".")
    assert (type(provider).__module__, type(provider).__name__) == (module, name)


def test_readme_has_the_table() -> None:
    readme = Path(__file__).parents[3] / "README.md"
    assert markdown() in readme.read_text()


def test_the_catalogue_names_each_architecture_once() -> None:
    names = [name for family in catalogue() for name in family.architectures]
    assert len(set(names)) == len(names)
    assert "Olmo3ForSequenceClassification" in names


# ---------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("size", ["olmo-tiny", "olmo2-tiny", "olmo3-tiny"])
def test_a_classifier_has_a_score_instead_of_a_head(size: str) -> None:
    config = as_classifier(published_sizes()[size].sizes[size], 7)
    family = bridge_for(config, "config.json")
    shapes = family.mapping_registry().resolve().hf_shapes
    assert family.num_labels == family.config_values["num_labels"] == 7
    assert shapes["score.weight"] == (7, 128)
    assert "lm_head.weight" not in shapes


def test_a_head_that_transformers_has_not_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel has no classification head"):
        as_classifier(published_sizes()["gpt2-tiny"].sizes["gpt2-tiny"], 2)
