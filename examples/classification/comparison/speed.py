"""Time classifiers on the same texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WARM_UP = 5
"""Calls before the clock starts: caches, compiled kernels, clocks of a GPU."""


@dataclass(frozen=True)
class Speed:
    """How fast a classifier labels texts, tokenizing included."""

    p50_ms: float
    """Median time for a single text."""
    p95_ms: float
    """95 of 100 single texts take no longer."""
    texts_per_s: float
    """In batches."""
    batch_size: int
    texts: int
    """How many were timed."""


Predict = Callable[[list[str]], Any]
"""Labels some texts; returns when they are computed."""


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
    """Return the seconds that each call takes, for each predictor."""
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
