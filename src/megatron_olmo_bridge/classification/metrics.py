"""How good a classifier's labels are, and how fast it gives them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

WARM_UP = 5
"""Calls before the clock runs: caches, compiled kernels, clocks of a GPU."""


@dataclass(frozen=True)
class ClassQuality:
    """Of one class; a ratio with nothing below the line is 0."""

    name: str
    precision: float
    recall: float
    f1: float
    count: int
    """Examples that are of this class."""


@dataclass(frozen=True)
class Quality:
    """What a classifier gets right."""

    accuracy: float
    macro_f1: float
    """Mean of the classes' F1, over those that occur among the labels or the predictions."""
    classes: tuple[ClassQuality, ...]
    confusion: list[list[int]]
    """[true class][predicted class]"""

    @property
    def confused(self) -> list[tuple[str, str, int]]:
        """True class, predicted class and how often, of wrong predictions; the most often first."""
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
    """From a confusion matrix, [true class, predicted class]."""
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
class Speed:
    """How fast a classifier labels texts, tokenising included."""

    p50_ms: float
    """Median time for a single text."""
    p95_ms: float
    """95 of 100 single texts take no longer."""
    texts_per_s: float
    """In batches."""
    batch_size: int
    texts: int
    """How many were timed."""


Predict = Callable[[list[str]], Sequence[int]]
"""Classes of some texts; returns when they are computed."""


def speeds(predictors: Sequence[Predict], texts: Sequence[str], batch_size: int) -> list[Speed]:
    """Time classifiers on the same texts, in turns: what disturbs one disturbs the others too.

    Args:
        predictors: on the same device.
        texts: at least one; each is timed alone, then all of them in batches.
        batch_size: texts of a batch.
    """
    singles = [[text] for text in texts]
    batches = [list(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    alone, together = (_seconds(predictors, calls) for calls in (singles, batches))
    return [
        Speed(
            p50_ms=float(np.percentile(one, 50)) * 1000,
            p95_ms=float(np.percentile(one, 95)) * 1000,
            texts_per_s=len(texts) / sum(many),
            batch_size=batch_size,
            texts=len(texts),
        )
        for one, many in zip(alone, together, strict=True)
    ]


def _seconds(predictors: Sequence[Predict], calls: list[list[str]]) -> list[list[float]]:
    """Of each predictor, the time that each call takes."""
    for i in range(WARM_UP):
        for predict in predictors:
            predict(calls[i % len(calls)])
    found: list[list[float]] = [[] for _ in predictors]
    for call in calls:
        for predict, seconds in zip(predictors, found, strict=True):
            begin = time.perf_counter()
            predict(call)
            seconds.append(time.perf_counter() - begin)
    return found
