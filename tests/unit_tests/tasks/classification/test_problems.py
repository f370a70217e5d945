"""What differs between problem types: how labels are read, and measures (by scikit-learn)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn import metrics

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.tasks.classification.data import Examples, load_examples
from megatron_olmo_bridge.tasks.classification.problems import (
    MultiLabel,
    Regression,
    SingleLabel,
    problem_of,
)
from megatron_olmo_bridge.training.config import ClassificationConfig

MULTI, REGRESSION = "multi_label_classification", "regression"


def load(folder: Path, problem_type: str, *labels: Any, held_out: Any = None) -> Examples:
    """The training examples of a .jsonl file with these labels."""
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    for file, values in ((train, labels), (validation, labels if held_out is None else held_out)):
        lines = [json.dumps({"text": f"text {i}", "label": x}) for i, x in enumerate(values)]
        file.write_text("\n".join(lines))
    config = ClassificationConfig(str(train), str(validation), problem_type=problem_type)
    return load_examples(config)[0]


# ---------------------------------------------------------------------------------------- labels


def test_lists_of_labels(tmp_path: Path) -> None:
    found = load(tmp_path, MULTI, ["b", "a"], [], ["c"], "a; c", ["a", "a"])
    assert found.classes == ("a", "b", "c")
    assert found.labels.dtype == np.float32
    assert found.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 0]]
    words = MultiLabel().describe(found.labels, found.classes)
    assert words == "3 labels, 1.2 a text, from 'b' (1) to 'a' (3)"


def test_one_value_or_several(tmp_path: Path) -> None:
    one = load(tmp_path, REGRESSION, 0.5, -1, "2.25")
    assert (one.classes, one.labels.tolist()) == (("label",), [[0.5], [-1.0], [2.25]])
    assert one.labels.dtype == np.float32
    several = load(tmp_path, REGRESSION, [0.5, 1], "2;-3e1")
    assert several.classes == ("label 0", "label 1")
    assert several.labels.tolist() == [[0.5, 1.0], [2.0, -30.0]]
    words = Regression().describe(one.labels, one.classes)
    assert words == "label from -1 to 2.25, mean 0.5833"


@pytest.mark.parametrize(
    ("problem_type", "labels", "expected"),
    [
        (MULTI, ("x;y", "", "y"), [[1, 1], [0, 0], [0, 1]]),
        (REGRESSION, ("1;2", "3;4", "0;-1"), [[1, 2], [3, 4], [0, -1]]),
    ],
)
def test_lists_in_a_csv_file(
    problem_type: str, labels: tuple[str, ...], expected: list[list[float]], tmp_path: Path
) -> None:
    file = tmp_path / "t.csv"
    file.write_text("text,label\n" + "".join(f"some text,{label}\n" for label in labels))
    config = ClassificationConfig(str(file), str(file), problem_type=problem_type)
    assert load_examples(config)[0].labels.tolist() == expected


@pytest.mark.parametrize(
    ("problem_type", "label", "message"),
    [
        (MULTI, 3, r"train\.jsonl:3: 'label' is 3, not a list of labels"),
        (MULTI, {"a": 1}, "not a list of labels"),
        (MULTI, [0.5], r"'label' is 0\.5, neither a text nor a whole number"),
        (MULTI, [""], "'label' is empty"),
        (REGRESSION, "good", r"train\.jsonl:3: 'label' is \[\"good\"\], not a number"),
        (REGRESSION, True, "'label' is true, not a number"),
        (REGRESSION, None, "'label' is null, not a number"),
        (REGRESSION, "", "not a number"),
        (REGRESSION, [], "not a number"),
        (REGRESSION, "inf", "not a number"),
        (REGRESSION, float("nan"), "not a number"),
        (REGRESSION, [1.0, 2.0], r"train\.jsonl:3: 2 values, the first text to train on has 1"),
    ],
)
def test_a_label_that_is_unsound_is_named(
    problem_type: str, label: Any, message: str, tmp_path: Path
) -> None:
    sound = (["a"], ["b"]) if problem_type == MULTI else (1.0, 2.0)
    with pytest.raises(InputError, match=message):
        load(tmp_path, problem_type, *sound, label)


def test_data_without_anything_to_learn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text has a label"):
        load(tmp_path, MULTI, [], [])
    with pytest.raises(InputError, match="all texts have the same values"):
        load(tmp_path, REGRESSION, 1.5, 1.5)
    with pytest.raises(InputError, match=r"validation\.jsonl:1: label 'z' never occurs"):
        load(tmp_path, MULTI, ["a"], ["b"], held_out=[["a", "z"]])


def test_an_unknown_problem_type_is_refused() -> None:
    with pytest.raises(InputError, match="'multi', not one of regression, single_label_class"):
        problem_of(ClassificationConfig(problem_type="multi"))


# -------------------------------------------------------------------------------------- measures


def in_two_batches(problem: Any, labels: torch.Tensor, predictions: torch.Tensor) -> Any:
    """The quality from the sums of two batches, as training adds them up."""
    outputs = labels.shape[1]
    parts = [
        problem.counts(labels[i], predictions[i], outputs) for i in (slice(0, 30), slice(30, None))
    ]
    sums = {name: parts[0][name].double() + parts[1][name].double() for name in parts[0]}
    return problem.quality(sums, [f"output {i}" for i in range(outputs)])


@pytest.mark.parametrize("seed", range(3))
def test_measures_of_several_labels_are_those_of_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(80, 4, generator=generator)
    labels = (logits + torch.randn(80, 4, generator=generator) > 0.3).float()
    labels[:, 3] = 0  # a label that no text has
    problem = MultiLabel()
    predictions = problem.predictions(logits)
    assert torch.equal(predictions, (logits.sigmoid() > 0.5).float())
    assert not problem.predictions(torch.zeros(2, 4)).any()  # of a new head
    found = in_two_batches(problem, labels, predictions)
    for average, measure in (("micro", found.micro_f1), ("macro", found.macro_f1)):
        expected = metrics.f1_score(labels, predictions, average=average, zero_division=0)
        assert measure == pytest.approx(expected)
    assert found.exact_match == pytest.approx(metrics.accuracy_score(labels, predictions))
    columns = metrics.precision_recall_fscore_support(labels, predictions, zero_division=0)
    for i, each in enumerate(found.classes):
        assert (each.precision, each.recall, each.f1, each.count) == pytest.approx(
            tuple(column[i] for column in columns)
        )


@pytest.mark.parametrize("outputs", [1, 3])
def test_measures_of_values_are_those_of_scikit_learn(outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    labels = 1000 + torch.randn(80, outputs, generator=generator)
    logits = labels + torch.randn(80, outputs, generator=generator)
    found = in_two_batches(Regression(), labels, Regression().predictions(logits))
    true, predicted = labels.double().numpy(), logits.double().numpy()
    assert found.mse == pytest.approx(metrics.mean_squared_error(true, predicted))
    assert found.mae == pytest.approx(metrics.mean_absolute_error(true, predicted))
    assert found.r2 == pytest.approx(metrics.r2_score(true, predicted))
    pearson = [pearsonr(true[:, i], predicted[:, i]).statistic for i in range(outputs)]
    assert [t.pearson for t in found.targets] == pytest.approx(pearson)
    assert found.pearson == pytest.approx(np.mean(pearson))


def test_constant_values_have_no_correlation() -> None:
    true, same = torch.tensor([[1.0], [2.0], [3.0]]), torch.full((3, 1), 2.1)
    found = Regression().quality(Regression().counts(true, same, 1), ["x"])
    assert found.pearson == 0 and found.r2 < 0
    found = Regression().quality(Regression().counts(same, true, 1), ["x"])
    assert (found.pearson, found.r2) == (0, 0)


def test_single_labels_are_counted_in_a_confusion_matrix() -> None:
    labels, predictions = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 2])
    counts = SingleLabel().counts(labels, predictions, 3)
    assert counts["confusion"].view(3, 3).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 2]]
