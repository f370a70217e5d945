"""``log.jsonl``: what happened in a run, one JSON object a line, in order."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import FormatError, OutputError
from megatron_olmo_bridge.formats.files import open_regular
from megatron_olmo_bridge.storage.atomic import replace_file

NAME = "log.jsonl"
HISTORY = {"begin", "resumed", "extended", "stopped", "done"}
"""Events that stay when a run goes back to an earlier step: they did happen."""

Line = dict[str, Any]


_SHOWN = 8
"""Numbers of lines that a message has."""
_NUMBERS = {
    "step": (
        "tokens",
        "loss",
        "z_loss",
        "lr",
        "grad_norm",
        "seconds",
        "tokens_per_second",
        "flops_per_second",
        "utilisation",
    ),
    "evaluation": ("loss",),
}
"""What a line of measured values has, each a number or null."""


class LogFile:
    """A log that is written to. Each line is flushed, so a killed run loses at most a part of one.

    A log that is there already is continued: whatever happened stays in it, so that it has each
    step once.

    Args:
        folder: Where ``log.jsonl`` is; made if it isn't there.
        resumed_at: The step that the run goes on from: lines of later steps are dropped, as these
            steps are taken again. None: from the beginning, so lines of all steps are dropped.

    Raises:
        FormatError: The log to continue has no line that can be read.
        OutputError: It can't be written.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self.path = folder / NAME
        self.damaged: list[int] = []
        """Numbers of the lines that were damaged, and are left out from now on."""
        kept: list[Line] = []
        if self.path.exists():
            lines, self.damaged = read_lines(self.path)
            until = -1 if resumed_at is None else resumed_at
            kept = [line for line in lines if line["event"] in HISTORY or line["step"] <= until]
        with _translate_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, "".join(map(_dumps, kept)))
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Append a line. Numbers that are not finite become null: JSON has none.

        Raises:
            OutputError: The disk is full, for example.
        """
        with _translate_errors(self.path):
            self._file.write(_dumps({"event": event, "time": round(time.time(), 3)} | facts))
            self._file.flush()

    def close(self) -> None:
        """End writing."""
        with contextlib.suppress(OSError):  # of what could not be written before
            self._file.close()


@contextlib.contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error


def read_lines(path: Path) -> tuple[list[Line], list[int]]:
    """All events of a log, and the numbers of the lines that are damaged.

    A kill leaves the last line half written, a power cut any line.

    Raises:
        FormatError: No line is an event, or it is not a regular file.
    """
    lines: list[Line] = []
    damaged = []
    with open_regular(path) as file:
        text = file.read().decode(errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if _is_event(value):
            lines.append(value)
        else:
            damaged.append(number)
    if damaged and not lines and text:
        raise FormatError(
            f"{path}: no line of it is an event in JSON. Move it away, to begin another log."
        )
    return lines, damaged if text else []


def lines_in_words(numbers: list[int]) -> str:
    """``lines 3, 7, 8 and 12 more``"""
    shown, more = ", ".join(map(str, numbers[:_SHOWN])), len(numbers) - _SHOWN
    return f"line{'s' * (len(numbers) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def _is_event(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("event"), str)
        and isinstance(value.get("time"), int | float)
        and isinstance(value.get("step"), int)
        and all(
            isinstance(value.get(name, ""), int | float | None)
            for name in _NUMBERS.get(value["event"], ())
        )
    )


def _dumps(line: Line) -> str:
    return json.dumps(_plain(line), allow_nan=False, default=str) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
