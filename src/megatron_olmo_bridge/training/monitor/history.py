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

STATES = {"begin": "running", "resumed": "running", "stopped": "stopped", "done": "done"}
"""State of a run after each event that changes it."""


@dataclass(frozen=True)
class RunHistory:
    """Lines of a run's log, in order; null is read as NaN."""

    facts: RunFacts
    steps: list[Line]
    """Lines of steps: ``step``, ``tokens``, ``loss``, ``lr``, ..."""
    evaluations: list[Line]
    """One line for each evaluated step: ``step``, ``loss``, and the :attr:`measures`."""
    events: list[Line]
    """All other lines."""
    last_time: float
    """Time of the last line, in seconds since 1970."""
    damaged: list[int]
    """Numbers of the lines of the log that are damaged, and left out here."""

    @classmethod
    def read(cls, folder: Path) -> RunHistory:
        """Read the log in a run's folder; the run may still be running.

        Raises:
            InputError: there is no log in the folder.
            FormatError: no line can be read, or none says how the run began.
        """
        path = folder / NAME
        if not path.is_file():
            raise InputError(
                f"{folder}: has no {NAME}, so it is not the folder of a run (checkpoint.save)"
            )
        lines, damaged = read_lines(path)
        begun = [line for line in lines if line["event"] in ("begin", "resumed")]
        if not begun:
            raise FormatError(f"{path}: no line says how the run began; the first one is missing")
        last = begun[-1]
        names = [f.name for f in fields(RunFacts) if f.name in last or f.default is MISSING]
        try:
            facts = RunFacts(**{name: last[name] for name in names})
        except KeyError as error:
            raise FormatError(f"{path}: the line {last['event']!r} lacks {error}") from None
        evaluations = [line for line in lines if line["event"] == "evaluation"]
        return cls(
            facts,
            [_null_to_nan(line) for line in lines if line["event"] == "step"],
            # A resumed run evaluates again at the step that it was saved at: keep the last line.
            list({line["step"]: _null_to_nan(line) for line in evaluations}.values()),
            [line for line in lines if line["event"] not in ("step", "evaluation")],
            lines[-1]["time"],
            damaged,
        )

    @property
    def measures(self) -> list[str]:
        """Names of the metrics of evaluations other than the loss: ``accuracy``, for example."""
        names = dict.fromkeys(name for line in self.evaluations for name in line)
        return [name for name in names if name not in ("event", "time", "step", "loss")]

    @property
    def end(self) -> Line:
        """The last event that set the run's state: begin, resumed, stopped or done."""
        return [event for event in self.events if event["event"] in STATES][-1]

    @property
    def state(self) -> str:
        """``running``, ``stopped`` or ``done``; a killed run logs no end, so it is ``running``."""
        return STATES[self.end["event"]]

    @property
    def sentence(self) -> str:
        """The run's state and progress, for people."""
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
        """Return the run's key figures, by name; None if unknown or not a finite number.

        Losses and metrics are the last ones, rates the medians over the lines. ``seconds`` is the
        time in steps, without evaluating and saving.
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


def _null_to_nan(line: Line) -> Line:
    return {name: math.nan if value is None else value for name, value in line.items()}
