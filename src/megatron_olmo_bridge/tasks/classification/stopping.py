"""Early stopping: the history of evaluations, the best one, and when to stop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.files import JSON_LIMIT, parse_json, read_small
from megatron_olmo_bridge.storage.atomic import replace_file

HISTORY = "evaluations.json"
"""File in the run's folder with the evaluations so far."""


class Evaluation(NamedTuple):
    """Score on the held-out data after a number of steps."""

    step: int
    score: float
    """``Problem.score``; higher is better."""


def best(history: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation with the highest score; the first one of equals."""
    return max(history, key=lambda e: e.score)


def out_of_patience(history: Sequence[Evaluation], patience: int | None) -> bool:
    """Return whether none of the last ``patience`` evaluations improved on those before."""
    if patience is None or not history:
        return False
    return len(history) - 1 - history.index(best(history)) >= patience


def write_history(file: Path, history: list[Evaluation]) -> None:
    """Save the evaluations, for resuming the run."""
    replace_file(file, json.dumps([e._asdict() for e in history]))


def read_history(file: Path) -> list[Evaluation]:
    """Return the evaluations of the run so far, if there are any.

    Raises:
        FormatError: the file is damaged, or written by an older version.
    """
    if not file.is_file():
        return []
    try:
        values = parse_json(read_small(file, JSON_LIMIT), file)
        history = [Evaluation(**value) for value in values]
        if not all(type(e.step) is int and isinstance(e.score, int | float) for e in history):
            raise TypeError("not the step and score of evaluations")
        return history
    except (FormatError, TypeError) as error:
        raise FormatError(
            f"{file}: is damaged, or was written by an older version, so that the best step of the "
            "run is unknown. Name another folder as checkpoint.save."
        ) from error
