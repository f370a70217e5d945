"""When training stops early."""

from __future__ import annotations

from megatron_olmo_bridge.classification.stopping import Evaluation, best, out_of_patience


def history(*scores: float) -> list[Evaluation]:
    return [Evaluation(10 * i, score) for i, score in enumerate(scores)]


def test_the_best_is_the_first_of_the_highest() -> None:
    assert best(history(0.1, 0.5, 0.5, 0.4)).step == 10


def test_patience_counts_evaluations_since_the_best() -> None:
    assert not out_of_patience(history(0.1, 0.5, 0.4), 2)
    assert out_of_patience(history(0.1, 0.5, 0.4, 0.5), 2)
    assert not out_of_patience(history(0.1, 0.5, 0.4, 0.3, 0.6), 2)


def test_without_patience_it_never_stops() -> None:
    assert not out_of_patience(history(0.5, *[0.1] * 50), None)
    assert not out_of_patience([], 1)
