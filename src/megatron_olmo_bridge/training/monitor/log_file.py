"""``log.jsonl``: what happened in a run, one JSON object a line, in order."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import FormatError

NAME = "log.jsonl"
HISTORY = {"begin", "resumed", "stopped"}
"""Events that stay when a run goes back to an earlier step: they did happen."""

Line = dict[str, Any]


class LogFile:
    """A log that is written to. Each line is flushed, so a killed run loses at most a part of one.

    Args:
        folder: Where ``log.jsonl`` is; made if it isn't there.
        resumed_at: The step that the run goes on from: lines of later steps are dropped. None
            begins a new log.

    Raises:
        FormatError: A line of the log to continue is not JSON.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        kept = [] if resumed_at is None else _until(resumed_at, path)
        temporary = path.with_name(f".{NAME}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_dumps, kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Append a line. Numbers that are not finite become null: JSON has none."""
        self._file.write(_dumps({"event": event, "time": round(time.time(), 3)} | facts))
        self._file.flush()

    def close(self) -> None:
        """End writing."""
        self._file.close()


def read_lines(path: Path) -> list[Line]:
    """All lines of a log. A last line that a killed run left half written is left out.

    Raises:
        FormatError: Another line is not a JSON object with an event.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    complete, _, _ = text.rpartition("\n")
    lines = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            value = json.loads(line)
            value["event"]
        except (ValueError, TypeError, KeyError):
            raise FormatError(
                f"{path}: line {number} is not an event in JSON: {line[:60]!r}. "
                "Delete that line, or move the log away to begin another."
            ) from None
        lines.append(value)
    return lines


def _until(step: int, path: Path) -> Iterable[Line]:
    lines = read_lines(path) if path.exists() else []
    return [e for e in lines if e["event"] in HISTORY or e.get("step", 0) <= step]


def _dumps(line: Line) -> str:
    return json.dumps(_plain(line), allow_nan=False, default=str) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
