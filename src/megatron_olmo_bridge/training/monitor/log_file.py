"""``log.jsonl``: the events of a run in order, one JSON object per line."""

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
"""Events that are kept when a run resumes from an earlier step."""
Line = dict[str, Any]
_SHOWN = 8
"""Maximum number of line numbers in a message."""
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
"""Values in the lines of an event; each is a number or null."""


class LogFile:
    """Log that is written, line by line; a killed run loses at most a part of the last line.

    An existing log is continued. Lines of steps that will be taken again are dropped, so that the
    log has each step once; lines of :data:`HISTORY` are kept.

    Args:
        folder: folder of ``log.jsonl``; created if missing.
        resumed_at: step that the run resumes from; None for a run that starts from the beginning.

    Raises:
        FormatError: the log to continue has no line that can be read.
        OutputError: the log can't be written.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self.path = folder / NAME
        self.damaged: list[int] = []
        """Numbers of the lines that were damaged, and are dropped."""
        kept: list[Line] = []
        if self.path.exists():
            lines, self.damaged = read_lines(self.path)
            last = -1 if resumed_at is None else resumed_at
            kept = [line for line in lines if line["event"] in HISTORY or line["step"] <= last]
        with _translate_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, "".join(map(_dumps, kept)))
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Append a line. Numbers that are not finite become null, as JSON can't express them.

        Raises:
            OutputError: the line can't be written, for example as the disk is full.
        """
        with _translate_errors(self.path):
            self._file.write(_dumps({"event": event, "time": round(time.time(), 3)} | facts))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # write() has reported it
            self._file.close()


@contextlib.contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error


def read_lines(path: Path) -> tuple[list[Line], list[int]]:
    """Return the lines of a log, and the numbers of those that are damaged and left out.

    A killed run leaves its last line half written; a power failure can damage any line.

    Raises:
        FormatError: no line is an event, or the log is not a regular file.
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
            f"{path}: no line is an event in JSON. Move the file away, to begin another log."
        )
    return lines, damaged if text else []


def lines_in_words(numbers: list[int]) -> str:
    """Return line numbers for a message: ``lines 3, 7, 8 and 12 more``."""
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
