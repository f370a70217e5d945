"""Confidence intervals: how far a measure on a few hundred texts can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution: intervals are of 95 %."""

Indices = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """Return the interval of a proportion, ``right`` of ``total``.

    Also for 0 and ``total``, where resampling would give an interval without width.
    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference,
    Journal of the American Statistical Association 22, 1927.
    """
    share, square = right / total, _Z * _Z
    center = (share + square / (2 * total)) / (1 + square / total)
    spread = share * (1 - share) / total + square / (4 * total * total)
    half = _Z * math.sqrt(spread) / (1 + square / total)
    return Interval(max(0.0, center - half), min(1.0, center + half))


def bootstrap(measure: Callable[[Indices], float], count: int, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of a measure; the same input gives the same values.

    Args:
        measure: The measure on these examples: indices [count], int64, drawn with replacement.
        count: Number of examples.
    """
    draw = np.random.default_rng(seed)
    values = [measure(draw.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))
