"""The evaluations of a run: which was the best, when to stop, and how they are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.files import JSON_LIMIT, parse_json, read_small
from megatron_olmo_bridge.storage.atomic import replace_file

HISTORY = "evaluations.json"
"""In the run's folder: the evaluations so far."""


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


def write_history(file: Path, history: list[Evaluation]) -> None:
    """Keep the evaluations for when the run is resumed."""
    replace_file(file, json.dumps([e._asdict() for e in history]))


def read_history(file: Path) -> list[Evaluation]:
    """Return the evaluations of the run so far, if there are any.

    Raises:
        FormatError: The file is damaged, or of an older version.
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
            "run is not known. Name another folder as checkpoint.save."
        ) from error
