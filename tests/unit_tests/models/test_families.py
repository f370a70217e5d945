"""What every family says of itself: sizes, numbers, mapping, provider."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.bridge import (
    ModelBridge,
    as_classifier,
    bridge_for,
    published_sizes,
)
from megatron_olmo_bridge.models.catalogue import catalogue, markdown

PARAMETERS = {
    "olmo-1b": 1_176_764_416, "olmo-7b": 6_888_095_744, "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176, "olmo3.1-7b": 7_298_011_136, "olmo3.1-32b": 32_233_522_176,
    "olmoe-1b-7b": 6_919_161_856, "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168, "gpt2-774m": 774_030_080, "gpt2-1.5b": 1_557_611_200,
}  # fmt: skip
TINY = [name for name in published_sizes() if name.endswith("-tiny")]


def bridge(size: str, **changes: Any) -> ModelBridge:
    return bridge_for(published_sizes()[size].sizes[size] | changes, "config.json")


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_sizes_have_the_published_parameters(size: str) -> None:
    shapes = bridge(size).mapping_registry().resolve().hf_shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[size]


@pytest.mark.parametrize("size", TINY)
def test_another_depth(size: str) -> None:
    kind = published_sizes()[size]
    assert kind(kind.with_layers(kind.sizes[size], 7)).num_layers == 7


@pytest.mark.parametrize("size", TINY)
def test_the_providers_numbers_are_the_configs(size: str) -> None:
    pytest.importorskip("megatron.core")
    family = bridge(size)
    provider = family.provider(params_dtype=__import__("torch").float32)
    assert {name: getattr(provider, name) for name in family.numbers} == family.numbers
    module, _, name = family.megatron_record.run_config(1024, "float32")["_target_"].rpartition(".")
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
    assert family.num_labels == family.numbers["num_labels"] == 7
    assert shapes["score.weight"] == (7, 128)
    assert "lm_head.weight" not in shapes


def test_without_labels_a_classifier_has_two() -> None:
    """As in transformers."""
    assert bridge("olmo2-tiny", architectures=["Olmo2ForSequenceClassification"]).num_labels == 2


def test_a_head_that_transformers_has_not_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel has no classification head"):
        as_classifier(published_sizes()["gpt2-tiny"].sizes["gpt2-tiny"], 2)


@pytest.mark.parametrize("labels", [-1, 2.5, "many"])
def test_labels_that_are_no_count_are_refused(labels: object) -> None:
    with pytest.raises(InputError, match="num_labels"):
        bridge("olmo2-tiny", architectures=["Olmo2ForSequenceClassification"], num_labels=labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"problem_type": "regresion"}, "'regresion', not one of regression, single_label_class"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "at least 2 labels"),
        (
            {"num_labels": 3, "id2label": {"0": "a", "1": "b"}},
            "num_labels is 3, but id2label has 2",
        ),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bridge("olmo2-tiny", architectures=["Olmo2ForSequenceClassification"], **values)


def test_the_problem_type_goes_with_the_head() -> None:
    values = {"problem_type": "regression", "num_labels": 1}
    head = bridge("olmo2-tiny", architectures=["Olmo2ForSequenceClassification"], **values)
    assert head.numbers["problem_type"] == "regression"
    assert "problem_type" not in bridge("olmo2-tiny", problem_type="regression").numbers
