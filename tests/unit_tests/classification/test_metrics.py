"""Figures of quality are scikit-learn's, and the clock measures what it says."""

from __future__ import annotations

import random

import pytest
from sklearn import metrics

from megatron_olmo_bridge.classification.metrics import quality, speeds


@pytest.mark.parametrize("seed", range(3))
def test_quality_is_that_of_scikit_learn(seed: int) -> None:
    """Also for classes that never occur, and for those that are never predicted."""
    rng = random.Random(seed)
    true, predicted = ([rng.choice(of) for _ in range(40)] for of in ((0, 1, 2, 3), (0, 1, 2, 4)))
    found = quality(true, predicted, ["a", "b", "c", "d", "e", "f"])
    assert found.accuracy == pytest.approx(metrics.accuracy_score(true, predicted))
    macro = metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(macro)
    assert found.confusion == metrics.confusion_matrix(true, predicted, labels=range(6)).tolist()
    columns = metrics.precision_recall_fscore_support(
        true, predicted, labels=range(6), zero_division=0
    )
    for i, name in enumerate(["precision", "recall", "f1", "count"]):
        assert [getattr(c, name) for c in found.classes] == pytest.approx(columns[i].tolist())


def test_the_most_confused_pairs_come_first() -> None:
    found = quality([0, 0, 0, 1, 2], [1, 1, 0, 2, 2], ["a", "b", "c"])
    assert found.confused == [("a", "b", 2), ("b", "c", 1)]


def test_speeds_are_measured_in_turns_on_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still while nothing is predicted: the machine may be busy."""
    now, calls = 0.0, []
    monkeypatch.setattr(
        "megatron_olmo_bridge.classification.metrics.time.perf_counter", lambda: now
    )

    def predictor(name: str, seconds: float):
        def predict(texts: list[str]) -> list[int]:
            nonlocal now
            calls.append((name, len(texts)))
            now += seconds * len(texts)
            return [0] * len(texts)

        return predict

    texts = ["text"] * 10
    fast, slow = speeds([predictor("fast", 0.001), predictor("slow", 0.01)], texts, 4)
    assert [name for name, _ in calls] == ["fast", "slow"] * (len(calls) // 2)
    timed = calls[10:30]  # after five calls of each to warm up
    assert {count for _, count in timed} == {1}
    assert [count for name, count in calls[-6:] if name == "slow"] == [4, 4, 2]
    for speed, milliseconds in ((fast, 1), (slow, 10)):
        assert speed.p50_ms == pytest.approx(milliseconds)
        assert speed.p95_ms == pytest.approx(milliseconds)
        assert speed.texts_per_s == pytest.approx(1000 / milliseconds)
        assert (speed.texts, speed.batch_size) == (10, 4)
