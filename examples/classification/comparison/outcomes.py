"""The predictions of each problem type, as a report shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_olmo_bridge.nn.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outcomes:
    """Measures, predictions and words of one problem type."""

    bounded: tuple[str, ...]
    """Measures that the report gives confidence intervals for."""
    scores: Callable[[torch.Tensor], torch.Tensor]
    """Logits to probabilities, or to the values of a regression, both [n, outputs]."""
    words: Callable[[Any, Sequence[str]], str]
    """An encoded label or prediction, and the names of the outputs, to text."""
    distance: Callable[[Any, Floats], float]
    """Size of an error, from the encoded label and the scores [outputs]: the probability of what is
    wrong, or the largest absolute error."""


def _labels(label: Floats, names: Sequence[str]) -> str:
    return ", ".join(n for n, on in zip(names, label, strict=True) if on) or "none"


def _values(label: Floats, names: Sequence[str]) -> str:
    return ", ".join(f"{value:.4g}" for value in label)


def _largest_error(label: Floats, scores: Floats) -> float:
    return float(np.abs(label - scores).max())


OUTCOMES = {
    SINGLE_LABEL: Outcomes(
        bounded=("accuracy", "macro_f1"),
        scores=lambda logits: logits.softmax(-1),
        words=lambda label, names: names[int(label)],
        distance=lambda label, scores: float(scores.max()),
    ),
    MULTI_LABEL: Outcomes(
        bounded=("micro_f1", "macro_f1"),
        scores=lambda logits: logits.sigmoid(),
        words=_labels,
        distance=_largest_error,
    ),
    REGRESSION: Outcomes(
        bounded=("mae", "r2"),
        scores=lambda logits: logits,
        words=_values,
        distance=_largest_error,
    ),
}
"""What differs between problem types, by problem type."""
