"""The history of a run, read from its log."""

from __future__ import annotations

import math
import statistics
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import FormatError, InputError

from .human import perplexity, when
from .log_file import NAME, Line, lines_in_words, read_lines
from .records import RunFacts

MEASURED = {"step", "evaluation"}
STATES = {"begin": "running", "resumed": "running", "stopped": "stopped", "done": "done"}


@dataclass(frozen=True)
class RunHistory:
    """What happened in a run, in order. In each list a line is a dict; null became NaN."""

    facts: RunFacts
    steps: list[Line]
    """The lines of steps: ``step``, ``tokens``, ``loss``, ``lr``, ..."""
    evaluations: list[Line]
    """One for each evaluated step: ``step``, ``loss``, and the :attr:`measures`."""
    events: list[Line]
    """All others."""
    last_time: float
    """Time of the last line, in seconds since 1970."""
    damaged: list[int]
    """Numbers of the lines of the log that could not be read, and are left out."""

    @classmethod
    def read(cls, folder: Path) -> RunHistory:
        """Read a run's log, also while the run goes on.

        Args:
            folder: The run's folder.

        Raises:
            InputError: There is no log in it.
            FormatError: No line can be read, or none says how the run began.
        """
        path = folder / NAME
        if not path.is_file():
            raise InputError(f"{folder}: no {NAME} in it, which training writes. Is it a run?")
        lines, damaged = read_lines(path)
        begun = [line for line in lines if line["event"] in ("begin", "resumed")]
        if not begun:
            raise FormatError(f"{path}: it doesn't say how the run began; its first line is gone")
        try:
            facts = RunFacts(
                **{
                    f.name: begun[-1][f.name]
                    for f in fields(RunFacts)
                    if f.name in begun[-1] or f.default is MISSING
                }
            )
        except KeyError as error:
            raise FormatError(f"{path}: the line {begun[-1]['event']!r} lacks {error}") from None
        return cls(
            facts,
            [_numbers(line) for line in lines if line["event"] == "step"],
            # A run that goes on evaluates again where it was saved.
            list({e["step"]: _numbers(e) for e in lines if e["event"] == "evaluation"}.values()),
            [line for line in lines if line["event"] not in MEASURED],
            lines[-1]["time"],
            damaged,
        )

    @property
    def measures(self) -> list[str]:
        """Names of what evaluations report beside the loss: ``accuracy``, for example."""
        names = dict.fromkeys(name for line in self.evaluations for name in line)
        return [name for name in names if name not in ("event", "time", "step", "loss")]

    @property
    def end(self) -> Line:
        """The event that says how things stand: begin, resumed, stopped or done."""
        return [event for event in self.events if event["event"] in STATES][-1]

    @property
    def state(self) -> str:
        """``running`` (or killed: then nobody wrote it down), ``stopped`` or ``done``."""
        return STATES[self.end["event"]]

    @property
    def sentence(self) -> str:
        """How things stand, for people."""
        left_out = f" Damaged in {NAME}, and left out: {lines_in_words(self.damaged)}."
        return self._progress + (left_out if self.damaged else "")

    @property
    def _progress(self) -> str:
        steps, end = self.facts.steps, self.end
        if self.state == "done":
            return f"All {steps:,} steps are done."
        if self.state == "stopped":
            why = end.get("message", "no reason was given")
            return f"Stopped at step {end['step']:,} of {steps:,}: {why}"
        last = self.steps[-1]["step"] if self.steps else end["step"]
        return (
            f"Running, or killed: last heard of at step {last:,} of {steps:,}, "
            f"{when(self.last_time)}."
        )

    def figures(self) -> dict[str, Any]:
        """The numbers that matter, as they last were. None: unknown, or not a number.

        Rates are medians over the lines; ``seconds`` are those of the steps alone.
        """
        last = self.steps[-1] if self.steps else {}
        loss = last.get("loss", math.nan)
        figures = {
            "step": last.get("step", 0),
            "steps": self.facts.steps,
            "tokens": last.get("tokens", 0),
            "parameters": self.facts.parameters,
            "loss": loss,
            "perplexity": perplexity(loss) if self.facts.has_perplexity else None,
            "evaluation_loss": self.evaluations[-1]["loss"] if self.evaluations else None,
            **{f"evaluation_{name}": self.evaluations[-1].get(name) for name in self.measures},
            "seconds": sum(line["seconds"] for line in self.steps),
            "skipped": sum(event["event"] == "skipped" for event in self.events),
            **{
                name: statistics.median(
                    [line[name] for line in self.steps if math.isfinite(line[name])] or [math.nan]
                )
                for name in ("tokens_per_second", "flops_per_second", "utilisation")
            },
        }
        return {"name": self.facts.name, "state": self.state} | {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in figures.items()
        }


def _numbers(line: Line) -> Line:
    return {name: math.nan if value is None else value for name, value in line.items()}
