"""The head that a config.json asks for."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge


def bridge(**changes: Any) -> Olmo2Bridge:
    return Olmo2Bridge(Olmo2Bridge.sizes["olmo2-tiny"] | changes)


def test_a_language_model_has_no_classes() -> None:
    assert bridge(num_labels=3).num_labels is None


def test_without_labels_a_classifier_has_two() -> None:
    """The default of transformers."""
    assert bridge(architectures=["Olmo2ForSequenceClassification"]).num_labels == 2


@pytest.mark.parametrize("labels", [-1, 2.5, "many"])
def test_a_number_of_labels_that_is_not_a_count_is_refused(labels: object) -> None:
    with pytest.raises(InputError, match="num_labels"):
        bridge(architectures=["Olmo2ForSequenceClassification"], num_labels=labels)


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
        bridge(architectures=["Olmo2ForSequenceClassification"], **values)


def test_the_problem_type_goes_with_the_head() -> None:
    values = {"problem_type": "regression", "num_labels": 1}
    head = bridge(architectures=["Olmo2ForSequenceClassification"], **values)
    assert head.config_values["problem_type"] == "regression"
    assert "problem_type" not in bridge(problem_type="regression").config_values
