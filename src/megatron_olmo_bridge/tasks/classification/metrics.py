"""Metrics of each problem type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


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
class Quality:
    """Metrics of a single-label classifier."""

    accuracy: float
    macro_f1: float
    """Mean F1 over the classes that occur in the labels or the predictions."""
    classes: tuple[ClassQuality, ...]
    confusion: list[list[int]]
    """Confusion matrix, [true class][predicted class]."""

    @property
    def measures(self) -> dict[str, float]:
        """Return the overall metrics, by name."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1}

    @property
    def confused(self) -> list[tuple[str, str, int]]:
        """Return (true class, predicted class, count) of wrong predictions, most frequent first."""
        names = [c.name for c in self.classes]
        pairs = [
            (names[i], names[j], count)
            for i, row in enumerate(self.confusion)
            for j, count in enumerate(row)
            if i != j and count
        ]
        return sorted(pairs, key=lambda pair: -pair[2])


def quality(true: npt.ArrayLike, predicted: npt.ArrayLike, classes: Sequence[str]) -> Quality:
    """Compare labels [n] with predictions [n], both indices into ``classes``."""
    count = len(classes)
    cells = np.asarray(true) * count + np.asarray(predicted)
    matrix = np.bincount(cells, minlength=count * count).reshape(count, count)
    return quality_of(matrix, classes)


def quality_of(confusion: Counts, classes: Sequence[str]) -> Quality:
    """Compute the metrics from a confusion matrix, [true class, predicted class]."""
    right, of_class, labelled = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = right / np.maximum(labelled, 1), right / np.maximum(of_class, 1)
    f1 = 2 * right / np.maximum(of_class + labelled, 1)
    columns = (precision.tolist(), recall.tolist(), f1.tolist(), of_class.tolist())
    return Quality(
        accuracy=float(right.sum() / max(confusion.sum(), 1)),
        macro_f1=float(f1[of_class + labelled > 0].mean()),
        classes=tuple(map(ClassQuality, classes, *columns)),
        confusion=confusion.tolist(),
    )


@dataclass(frozen=True)
class MultiLabelQuality:
    """Metrics of a multi-label classifier.

    Source: ``f1_score(average="micro")``, ``f1_score(average="macro", zero_division=0)`` and
    ``accuracy_score`` of scikit-learn.
    """

    micro_f1: float
    """F1 over the decisions of all labels together."""
    macro_f1: float
    """Mean F1 of the labels."""
    exact_match: float
    """Fraction of texts whose labels are all correct."""
    classes: tuple[ClassQuality, ...]

    @property
    def measures(self) -> dict[str, float]:
        """Return the overall metrics, by name."""
        return {n: getattr(self, n) for n in ("micro_f1", "macro_f1", "exact_match")}


def multi_label_quality(
    counts: Mapping[str, npt.NDArray[Any]], classes: Sequence[str]
) -> MultiLabelQuality:
    """Compute the metrics from sums over texts.

    Args:
        counts: ``right``, ``occurring`` and ``predicted`` of each label, [labels]; ``exact`` and
            ``texts``, numbers of texts.
        classes: names of the labels.
    """
    right, occurring, predicted = (counts[n] for n in ("right", "occurring", "predicted"))
    f1 = 2 * right / np.maximum(occurring + predicted, 1)
    columns = (
        (right / np.maximum(predicted, 1)).tolist(),
        (right / np.maximum(occurring, 1)).tolist(),
        f1.tolist(),
        occurring.astype(int).tolist(),
    )
    return MultiLabelQuality(
        micro_f1=float(2 * right.sum() / max(occurring.sum() + predicted.sum(), 1)),
        macro_f1=float(f1.mean()),
        exact_match=float(counts["exact"] / max(counts["texts"], 1)),
        classes=tuple(map(ClassQuality, classes, *columns)),
    )


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
class RegressionQuality:
    """Metrics of a regression, averaged over the values.

    Source: ``mean_squared_error``, ``mean_absolute_error`` and ``r2_score`` of scikit-learn;
    Pearson's correlation as ``scipy.stats.pearsonr``.
    """

    mse: float
    mae: float
    r2: float
    pearson: float
    targets: tuple[TargetQuality, ...]

    @property
    def measures(self) -> dict[str, float]:
        """Return the overall metrics, by name."""
        return {n: getattr(self, n) for n in ("mse", "mae", "r2", "pearson")}


def regression_quality(
    counts: Mapping[str, npt.NDArray[Any]], names: Sequence[str]
) -> RegressionQuality:
    """Compute the metrics from sums over texts, float64.

    Args:
        counts: ``true``, ``predicted``, ``true_squared``, ``predicted_squared``, ``product``,
            ``absolute_error`` and ``squared_error`` of each value, [values]; ``texts``.
        names: Names of the values.
    """
    texts = max(float(counts["texts"]), 1.0)
    means = {name: value / texts for name, value in counts.items()}
    true_variance = means["true_squared"] - means["true"] ** 2
    variance = means["predicted_squared"] - means["predicted"] ** 2
    covariance = means["product"] - means["true"] * means["predicted"]
    # Treat a variance within rounding error as 0: the values are constant.
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
    each = [
        TargetQuality(name, **{k: float(v[i]) for k, v in measures.items()})
        for i, name in enumerate(names)
    ]
    return RegressionQuality(
        **{k: float(v.mean()) for k, v in measures.items()}, targets=tuple(each)
    )
