"""Predictions as a report shows them, for each problem type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparison.outcomes import OUTCOMES

from megatron_olmo_bridge.nn.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from megatron_olmo_bridge.tasks.classification.problems import problem_of
from megatron_olmo_bridge.training.config import ClassificationConfig

NAMES = ("a", "b", "c")


@pytest.mark.parametrize(
    ("problem_type", "logits", "label", "words", "distance"),
    [
        (SINGLE_LABEL, [np.log(2), np.log(5), 0.0], 2, "c", 5 / 8),
        (MULTI_LABEL, [0.0, np.log(3), -np.log(4)], [1, 0, 0], "a", 3 / 4),
        (MULTI_LABEL, [0.0, -9.0, -9.0], [0, 0, 0], "none", 1 / 2),
        (REGRESSION, [1.0, 2.5, -3.0], [1, 2, -5], "1, 2, -5", 2.0),
    ],
)
def test_words_and_distance(
    problem_type: str, logits: list[float], label: object, words: str, distance: float
) -> None:
    shown = OUTCOMES[problem_type]
    assert shown.words(np.array(label), NAMES) == words
    scores = shown.scores(torch.tensor([logits]))[0].numpy()
    assert shown.distance(np.array(label), scores) == pytest.approx(distance)


@pytest.mark.parametrize("problem_type", OUTCOMES)
def test_intervals_are_of_measures_that_the_problem_type_has(problem_type: str) -> None:
    problem, shown = problem_of(ClassificationConfig(problem_type=problem_type)), OUTCOMES
    labels = torch.ones(2, 1).long()[:, 0] if problem_type == SINGLE_LABEL else torch.ones(2, 1)
    quality = problem.quality(problem.counts(labels * 0, labels * 0, 1), ["a"])
    assert set(shown[problem_type].bounded) <= quality.measures.keys()
