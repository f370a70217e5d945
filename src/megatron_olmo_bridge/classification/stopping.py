"""Which evaluation was the best, and when to stop hoping for a better one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Evaluation(NamedTuple):
    """On the held-out data, after so many steps."""

    step: int
    score: float
    """The measure that the problem type is judged by; higher is better."""


def best(history: Sequence[Evaluation]) -> Evaluation:
    """Return the one with the highest score; of equals the first."""
    return max(history, key=lambda e: e.score)


def out_of_patience(history: Sequence[Evaluation], patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations were all no better than one before them."""
    if patience is None or not history:
        return False
    return len(history) - 1 - history.index(best(history)) >= patience
