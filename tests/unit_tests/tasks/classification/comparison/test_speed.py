"""The clock measures what it says."""

from __future__ import annotations

import pytest
from comparison.speed import speeds


def test_speeds_are_measured_in_turns_on_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this test advances only during predictions: the machine may be busy."""
    now, calls = 0.0, []
    monkeypatch.setattr("comparison.speed.time.perf_counter", lambda: now)

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
