"""Metrics agree with those of scikit-learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn import metrics

from megatron_olmo_bridge.tasks.classification.metrics import single_label_quality


@pytest.mark.parametrize("seed", range(3))
def test_quality_is_that_of_scikit_learn(seed: int) -> None:
    """Also for classes that never occur, and for those that are never predicted."""
    rng = random.Random(seed)
    true, predicted = ([rng.choice(of) for _ in range(40)] for of in ((0, 1, 2, 3), (0, 1, 2, 4)))
    confusion = metrics.confusion_matrix(true, predicted, labels=range(6))
    found = single_label_quality(confusion, ["a", "b", "c", "d", "e", "f"])
    assert found.accuracy == pytest.approx(metrics.accuracy_score(true, predicted))
    macro = metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(macro)
    assert found.confusion == confusion.tolist()
    columns = metrics.precision_recall_fscore_support(
        true, predicted, labels=range(6), zero_division=0
    )
    for i, name in enumerate(["precision", "recall", "f1", "count"]):
        assert [getattr(c, name) for c in found.classes] == pytest.approx(columns[i].tolist())


def test_the_most_confused_pairs_come_first() -> None:
    confusion = np.array([[1, 2, 0], [0, 0, 1], [0, 0, 1]])
    found = single_label_quality(confusion, ["a", "b", "c"])
    assert found.confused == [("a", "b", 2), ("b", "c", 1)]
