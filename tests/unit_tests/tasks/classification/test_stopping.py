"""When training stops early, and how its evaluations are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.tasks.classification.stopping import (
    Evaluation,
    best,
    out_of_patience,
    read_history,
    write_history,
)


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


def test_the_history_comes_back(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none.json") == []
    history = [Evaluation(10, 0.5), Evaluation(20, 1 / 3)]
    write_history(tmp_path / "history.json", history)
    assert read_history(tmp_path / "history.json") == history


@pytest.mark.parametrize(
    "text",
    [
        '[{"step": 10, "macro_f1": 0.5}]',
        '[{"step": "10", "score": 0.5}]',
        '[{"step": 10, "score": null}]',
        "[{",
        "[1]",
        "3",
        "",
        "[" * 100_000,
    ],
)
def test_a_history_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(FormatError, match=r"history\.json: is damaged.*another folder"):
        read_history(tmp_path / "history.json")
