"""Problem types: how each reads labels, makes predictions and computes metrics."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.problem_types import (
    MULTI_LABEL,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE_LABEL,
)
from megatron_olmo_bridge.training.config import ClassificationConfig

from .metrics import Metrics, multi_label_quality, regression_quality, single_label_quality

SEPARATOR = ";"
"""Separates the labels, or the values, of a text in a .csv file."""
_SHOWN = 8
"""Maximum number of names in a message."""

Counts = dict[str, torch.Tensor]
"""Sums over texts, from which the metrics are computed; batches are added up."""


class Problem(ABC):
    """Interface of a problem type."""

    problem_type: ClassVar[str]
    """Value of ``problem_type`` in config.json."""
    loss_unit: ClassVar[str]
    score: ClassVar[str]
    """Metric by which the best weights are chosen; higher is better."""

    @abstractmethod
    def read(self, value: Any, name: str, where: str) -> Any:
        """Return the label in a field's value.

        Args:
            value: the field's value in JSON, or its text in a .csv file.
            name: name of the field.
            where: file and line.

        Raises:
            InputError: the value is not a label of this problem type.
        """

    @abstractmethod
    def names(self, labels: Sequence[Any], field: str, path: str) -> tuple[str, ...]:
        """Return the names of the model's outputs, from the labels of the training file.

        Raises:
            InputError: there is nothing to learn, as all labels are equal or none occurs.
        """

    @abstractmethod
    def encode(self, label: Any, names: Sequence[str]) -> Any:
        """Return a label as numbers: an index, or one number for each name.

        Raises:
            ValueError: the label is unknown or has the wrong length; the caller adds file and line
                to the message.
        """

    @abstractmethod
    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the predictions for logits [n, outputs], encoded as the labels are."""

    @abstractmethod
    def counts(self, labels: torch.Tensor, predictions: torch.Tensor, outputs: int) -> Counts:
        """Return the sums over a batch of labels and predictions."""

    @abstractmethod
    def quality(self, counts: Counts, names: Sequence[str]) -> Metrics:
        """Return the metrics from the sums over all texts, on the CPU."""

    @abstractmethod
    def describe(self, labels: npt.NDArray[Any], names: Sequence[str]) -> str:
        """Describe the labels of the training file in words."""


class SingleLabel(Problem):
    """One class per text."""

    problem_type = SINGLE_LABEL
    loss_unit = "nats per text"
    score = "macro_f1"

    def read(self, value: Any, name: str, where: str) -> str:
        return _class_name(value, name, where)

    def names(self, labels: Sequence[str], field: str, path: str) -> tuple[str, ...]:
        found = set(labels)
        if len(found) == 1:
            raise InputError(
                f"{path}: has a single class, {found.pop()!r}: there is nothing to learn"
            )
        return _sorted(found)

    def encode(self, label: str, names: Sequence[str]) -> int:
        if label not in names:
            raise ValueError(_unknown([label], names))
        return names.index(label)

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def counts(self, labels: torch.Tensor, predictions: torch.Tensor, outputs: int) -> Counts:
        cells = labels * outputs + predictions
        return {"confusion": torch.bincount(cells, minlength=outputs**2)}

    def quality(self, counts: Counts, names: Sequence[str]) -> Metrics:
        matrix = counts["confusion"].numpy().astype(np.int64)
        return single_label_quality(matrix.reshape(len(names), -1), names)

    def describe(self, labels: npt.NDArray[Any], names: Sequence[str]) -> str:
        counts = np.bincount(labels, minlength=len(names))
        return f"{len(names)} classes, {_extremes(counts, names)}"


class MultiLabel(Problem):
    """Any number of classes per text; a class is predicted if its probability is above 0.5."""

    problem_type = MULTI_LABEL
    loss_unit = "nats per label"
    score = "macro_f1"

    def read(self, value: Any, name: str, where: str) -> list[str]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(SEPARATOR) if part.strip()]
        if not isinstance(value, list):
            raise InputError(
                f"{where}: {name!r} is {json.dumps(value)[:40]}, not a list of labels (in a .csv "
                f"file, separated by {SEPARATOR!r})"
            )
        return [_class_name(item, name, where) for item in value]

    def names(self, labels: Sequence[list[str]], field: str, path: str) -> tuple[str, ...]:
        found = {name for label in labels for name in label}
        if not found:
            raise InputError(f"{path}: no text has a label: there is nothing to learn")
        return _sorted(found)

    def encode(self, label: list[str], names: Sequence[str]) -> list[float]:
        if unknown := [name for name in label if name not in names]:
            raise ValueError(_unknown(unknown, names))
        return [float(name in label) for name in names]

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        # sigmoid(0) is 0.5. Strictly above, as a new head of zeros must not predict every class.
        return (logits > 0).float()

    def counts(self, labels: torch.Tensor, predictions: torch.Tensor, outputs: int) -> Counts:
        return {
            "right": (labels * predictions).sum(0),
            "occurring": labels.sum(0),
            "predicted": predictions.sum(0),
            "exact": (labels == predictions).all(1).sum(),
            "texts": torch.tensor(len(labels), device=labels.device),
        }

    def quality(self, counts: Counts, names: Sequence[str]) -> Metrics:
        return multi_label_quality({k: v.numpy() for k, v in counts.items()}, names)

    def describe(self, labels: npt.NDArray[Any], names: Sequence[str]) -> str:
        return (
            f"{len(names)} labels, {labels.sum(1).mean():.1f} a text, "
            f"{_extremes(labels.sum(0).astype(int), names)}"
        )


class Regression(Problem):
    """One or more values per text."""

    problem_type = REGRESSION
    loss_unit = "squared error"
    score = "r2"

    def read(self, value: Any, name: str, where: str) -> list[float]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(SEPARATOR)]
        items = value if isinstance(value, list) else [value]
        try:
            if not items or any(isinstance(item, bool) for item in items):
                raise ValueError
            values = [float(item) for item in items]
            if not all(map(math.isfinite, values)):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{where}: {name!r} is {json.dumps(value)[:40]}, not a number or a list of numbers "
                f"(in a .csv file, separated by {SEPARATOR!r})"
            ) from error
        return values

    def names(self, labels: Sequence[list[float]], field: str, path: str) -> tuple[str, ...]:
        count = len(labels[0])
        if all(label == labels[0] for label in labels):
            raise InputError(f"{path}: all texts have the same values: there is nothing to learn")
        return (field,) if count == 1 else tuple(f"{field} {i}" for i in range(count))

    def encode(self, label: list[float], names: Sequence[str]) -> list[float]:
        if len(label) != len(names):
            raise ValueError(f"{len(label)} values, the first text to train on has {len(names)}")
        return label

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def counts(self, labels: torch.Tensor, predictions: torch.Tensor, outputs: int) -> Counts:
        true, predicted = labels.double(), predictions.double()
        error = predicted - true
        return {
            "true": true.sum(0),
            "predicted": predicted.sum(0),
            "true_squared": true.square().sum(0),
            "predicted_squared": predicted.square().sum(0),
            "product": (true * predicted).sum(0),
            "absolute_error": error.abs().sum(0),
            "squared_error": error.square().sum(0),
            "texts": torch.tensor(len(labels), device=labels.device),
        }

    def quality(self, counts: Counts, names: Sequence[str]) -> Metrics:
        return regression_quality({k: v.numpy() for k, v in counts.items()}, names)

    def describe(self, labels: npt.NDArray[Any], names: Sequence[str]) -> str:
        spans = zip(names, labels.min(0), labels.max(0), labels.mean(0), strict=True)
        return "; ".join(f"{n} from {a:.4g} to {b:.4g}, mean {m:.4g}" for n, a, b, m in spans)


_PROBLEMS: dict[str, Problem] = {
    problem.problem_type: problem for problem in (SingleLabel(), MultiLabel(), Regression())
}


def problem_of(config: ClassificationConfig) -> Problem:
    """Return the problem that ``classification.problem_type`` names.

    Raises:
        InputError: unknown problem type.
    """
    if config.problem_type not in _PROBLEMS:
        raise InputError(
            f"classification.problem_type is {config.problem_type!r}, not one of "
            f"{', '.join(PROBLEM_TYPES)}"
        )
    return _PROBLEMS[config.problem_type]


def head_labels(classes: Sequence[str], problem_type: str) -> dict[str, Any]:
    """Return the entries of config.json that describe a classification head."""
    return {
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": problem_type,
    }


def some(names: Sequence[str]) -> str:
    """Return the first names, quoted, and the number of the others, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _class_name(value: Any, name: str, where: str) -> str:
    if type(value) not in (str, int):
        raise InputError(
            f"{where}: {name!r} is {json.dumps(value)[:40]}, neither a text nor a whole number"
        )
    if not str(value).strip():
        raise InputError(f"{where}: {name!r} is empty")
    return str(value)


def _sorted(names: set[str]) -> tuple[str, ...]:
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=int if numbers else None))


def _unknown(labels: Sequence[str], names: Sequence[str]) -> str:
    return f"label {labels[0]!r} never occurs in the texts to train on, which have {some(names)}"


def _extremes(counts: npt.NDArray[Any], names: Sequence[str]) -> str:
    by_count = sorted(zip(names, counts.tolist(), strict=True), key=lambda pair: -pair[1])
    (common, most), (rare, least) = by_count[0], by_count[-1]
    return f"from {rare!r} ({least:,}) to {common!r} ({most:,})"
