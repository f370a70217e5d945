"""Metrics of each problem type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Metrics:
    """Base class of the metrics of each problem type."""

    overall: ClassVar[tuple[str, ...]]
    """Names of the fields with overall metrics."""

    @property
    def measures(self) -> dict[str, float]:
        """The overall metrics, by name."""
        return {name: getattr(self, name) for name in self.overall}


@dataclass(frozen=True)
class ClassQuality:
    """Metrics of one class; a ratio with denominator 0 is 0."""

    name: str
    precision: float
    recall: float
    f1: float
    count: int
    """Number of examples of this class."""


@dataclass(frozen=True)
class Quality(Metrics):
    """Metrics of a single-label classifier."""

    overall = ("accuracy", "macro_f1")
    accuracy: float
    macro_f1: float
    """Mean F1 over the classes that occur in the labels or the predictions."""
    classes: tuple[ClassQuality, ...]
    confusion: list[list[int]]
    """Confusion matrix, [true class][predicted class]."""

    @property
    def confused(self) -> list[tuple[str, str, int]]:
        """(True class, predicted class, count) of wrong predictions, most frequent first."""
        names = [c.name for c in self.classes]
        pairs = [
            (names[i], names[j], count)
            for i, row in enumerate(self.confusion)
            for j, count in enumerate(row)
            if i != j and count
        ]
        return sorted(pairs, key=lambda pair: -pair[2])


def single_label_quality(confusion: Array, classes: Sequence[str]) -> Quality:
    """Compute the metrics from a confusion matrix, [true class, predicted class], of int64."""
    right, occurring, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = _f1(right, occurring, predicted)
    return Quality(
        accuracy=float(right.sum() / max(confusion.sum(), 1)),
        macro_f1=float(f1[occurring + predicted > 0].mean()),
        classes=_class_qualities(classes, right, occurring, predicted),
        confusion=confusion.tolist(),
    )


@dataclass(frozen=True)
class MultiLabelQuality(Metrics):
    """Metrics of a multi-label classifier.

    Source: ``f1_score(average="micro")``, ``f1_score(average="macro", zero_division=0)`` and
    ``accuracy_score`` of scikit-learn.
    """

    overall = ("micro_f1", "macro_f1", "exact_match")
    micro_f1: float
    """F1 over all decisions, of all labels together."""
    macro_f1: float
    """Mean F1 of the labels."""
    exact_match: float
    """Fraction of texts whose labels are all correct."""
    classes: tuple[ClassQuality, ...]


def multi_label_quality(counts: Mapping[str, Array], classes: Sequence[str]) -> MultiLabelQuality:
    """Compute the metrics from sums over texts.

    Args:
        counts: ``right``, ``occurring`` and ``predicted`` of each label, [labels]; ``exact`` and
            ``texts``, the numbers of texts whose labels are all correct and of all texts.
        classes: names of the labels.
    """
    right, occurring, predicted = (counts[n] for n in ("right", "occurring", "predicted"))
    return MultiLabelQuality(
        micro_f1=float(_f1(right.sum(), occurring.sum(), predicted.sum())),
        macro_f1=float(_f1(right, occurring, predicted).mean()),
        exact_match=float(counts["exact"] / max(counts["texts"], 1)),
        classes=_class_qualities(classes, right, occurring, predicted),
    )


def _f1(right: Any, occurring: Any, predicted: Any) -> Any:
    """Return F1 from counts: numbers or arrays."""
    return 2 * right / np.maximum(occurring + predicted, 1)


def _class_qualities(
    names: Sequence[str], right: Array, occurring: Array, predicted: Array
) -> tuple[ClassQuality, ...]:
    """Return the metrics of each class from its numbers of right predictions, examples and
    predictions, [classes]."""
    columns = (
        right / np.maximum(predicted, 1),
        right / np.maximum(occurring, 1),
        _f1(right, occurring, predicted),
        occurring.astype(int),
    )
    return tuple(map(ClassQuality, names, *(column.tolist() for column in columns)))


@dataclass(frozen=True)
class TargetQuality:
    """Metrics of one predicted value."""

    name: str
    mse: float
    """Mean squared error."""
    mae: float
    """Mean absolute error."""
    r2: float
    """Coefficient of determination; 0 if all true values are equal."""
    pearson: float
    """Pearson correlation of true and predicted values; 0 if either is constant."""


@dataclass(frozen=True)
class RegressionQuality(Metrics):
    """Metrics of a regression, averaged over the values.

    Source: ``mean_squared_error``, ``mean_absolute_error`` and ``r2_score`` of scikit-learn, and
    ``scipy.stats.pearsonr``.
    """

    overall = ("mse", "mae", "r2", "pearson")
    mse: float
    mae: float
    r2: float
    pearson: float
    targets: tuple[TargetQuality, ...]


def regression_quality(counts: Mapping[str, Array], names: Sequence[str]) -> RegressionQuality:
    """Compute the metrics from sums over texts, float64.

    Args:
        counts: ``true``, ``predicted``, ``true_squared``, ``predicted_squared``, ``product``,
            ``absolute_error`` and ``squared_error`` of each value, [values]; ``texts``.
        names: names of the values.
    """
    texts = max(float(counts["texts"]), 1.0)
    means = {name: value / texts for name, value in counts.items()}
    true_variance = means["true_squared"] - means["true"] ** 2
    variance = means["predicted_squared"] - means["predicted"] ** 2
    covariance = means["product"] - means["true"] * means["predicted"]
    # Values whose variance is within rounding error are constant.
    varies = true_variance > 1e-12 * means["true_squared"]
    both_vary = varies & (variance > 1e-12 * means["predicted_squared"])
    r2 = np.where(varies, 1 - means["squared_error"] / np.where(varies, true_variance, 1), 0)
    spread = np.sqrt(np.where(both_vary, true_variance * variance, 1))
    measures = {
        "mse": means["squared_error"],
        "mae": means["absolute_error"],
        "r2": r2,
        "pearson": np.where(both_vary, covariance / spread, 0).clip(-1, 1),
    }
    targets = tuple(
        TargetQuality(name, **{k: float(v[i]) for k, v in measures.items()})
        for i, name in enumerate(names)
    )
    return RegressionQuality(**{k: float(v.mean()) for k, v in measures.items()}, targets=targets)
