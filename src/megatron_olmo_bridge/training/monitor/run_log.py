"""Console lines of a run, and the log that its report is made from."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import BridgeError

from ..config import LoggingConfig
from .human import SI, compact, duration, perplexity, short, spoken
from .log_file import LogFile, lines_in_words
from .records import RunFacts, StepRecord
from .report import write_report
from .trackers import trackers

HEADER_EVERY = 20
"""Number of lines between headers of the console table."""
RECENT = 100
"""Number of steps whose median time determines the time left."""


class RunLog:
    """Log of a run: console lines, ``log.jsonl``, trackers and, at the end, ``report.html``.

    That of any process but the first has no folder and prints nothing.

    Args:
        facts: facts that hold for the whole run.
        settings: section ``logging`` of the config.
        folder: the run's folder; without one, nothing is written.
        resumed_at: step of the checkpoint that the run resumes from; None for a run that starts
            from the beginning. Lines of later steps are dropped.
        say: prints a line for people.

    Raises:
        InputError: a tracker's package is missing, or TensorBoard has no folder to write to.
        FormatError: the log to continue has no line that can be read.
        OutputError: the log can't be written.
    """

    def __init__(
        self,
        facts: RunFacts,
        settings: LoggingConfig,
        folder: Path | None,
        *,
        resumed_at: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._facts, self._interval, self._folder, self._say = facts, settings.interval, folder, say
        self._trackers = list(trackers(settings, facts.name, facts.config, folder, resumed_at))
        self._file = LogFile(folder, resumed_at) if folder is not None else None
        if self._file is not None and self._file.damaged:
            damaged = lines_in_words(self._file.damaged)
            say(f">> {self._file.path}: left out what is damaged, {damaged}")
        self._rows = 0  # printed so far
        self._waiting: list[StepRecord] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        if resumed_at is None:
            self._write("begin", step=0, **asdict(facts))
        else:
            self._write("resumed", step=resumed_at, **asdict(facts))
            self._announce("resumed", resumed_at)

    def step(self, record: StepRecord) -> None:
        """Add a step, and log a line every ``logging.interval`` steps, at the first and the last.

        The line's loss, z-loss and gradient norm are means over the steps since the previous line.
        """
        if record.skipped:
            message = f"not taken (loss {record.loss:.4f}, gradient norm {record.grad_norm:.3g})"
            self.event("skipped", record.step, message=message)
        self._waiting.append(record)
        self._recent.append(record.seconds)
        if record.step in (1, self._facts.steps) or record.step % self._interval == 0:
            self._line()

    def _line(self) -> None:
        """Log one line for the waiting steps."""
        step, line = self._waiting[-1].step, self._summary()
        self._waiting.clear()
        self._write("step", step=step, **line)
        left = statistics.median(self._recent) * (self._facts.steps - step)
        for text in self._table(step, line, left):
            self._say(text)
        self._track(step, "train", line)

    def evaluation(self, step: int, loss: float, **figures: float) -> None:
        """Log the loss on held-out data after a step (0: before the first).

        Args:
            figures: other metrics by name, for example ``accuracy``.
        """
        self._write("evaluation", step=step, loss=loss, **figures)
        parts = [f"loss {loss:.4f}"]
        if self._facts.has_perplexity:
            parts.append(f"perplexity {compact(perplexity(loss), 2)}")
        parts += [f"{spoken(name)} {value:.4f}" for name, value in figures.items()]
        self._announce("evaluation", step, message=", ".join(parts))
        self._track(step, "evaluation", {"loss": loss, **figures})

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """Log any other event.

        Args:
            kind: ``checkpoint``, ``export``, ``extended``, ``stopped`` or ``done``.
            facts: details: ``path`` of what was written, ``message`` with a reason.
        """
        if kind == "stopped" and self._waiting:
            self._line()
        self._write(kind, step=step, **facts)
        self._announce(kind, step, **facts)

    def close(self) -> None:
        """Close trackers and log, and write the report if there is a folder."""
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None and self._folder is not None:
            self._file.close()
            try:
                self._say(f">> report: {write_report(self._folder)}")
            except (BridgeError, OSError) as error:  # the run itself has not failed
                self._say(f">> no report: {error}")

    def _summary(self) -> dict[str, Any]:
        """Return the values of the waiting steps' line."""
        records = self._waiting
        seconds = sum(r.seconds for r in records)
        rate = len(records) * self._facts.tokens_per_step / seconds if seconds > 0 else float("nan")
        peak = self._facts.peak_flops
        return {
            "tokens": records[-1].tokens,
            "loss": statistics.fmean(r.loss for r in records),
            "z_loss": statistics.fmean(r.z_loss for r in records),
            "lr": records[-1].lr,
            "grad_norm": statistics.fmean(r.grad_norm for r in records),
            "seconds": seconds,
            "tokens_per_second": rate,
            "flops_per_second": rate * self._facts.flops_per_token,
            "utilisation": None if peak is None else rate * self._facts.flops_per_token / peak,
        }

    def _table(self, step: int, line: dict[str, Any], seconds_left: float) -> list[str]:
        """Return the next row of the console table, at most 100 columns wide.

        A header precedes it every :data:`HEADER_EVERY` rows.
        """
        steps, utilisation = self._facts.steps, line["utilisation"]
        columns = [
            ("step", max(9, 2 * len(str(steps)) + 1), f"{step}/{steps}"),
            ("tokens", 6, short(line["tokens"])),
            ("loss", 7, f"{line['loss']:.4f}"),
            ("lr", 8, f"{line['lr']:.2e}"),
            ("grad norm", 9, compact(line["grad_norm"], 3)),
            ("tokens/s", 8, short(line["tokens_per_second"])),
            ("FLOP/s", 6, short(line["flops_per_second"], SI)),
            ("time left", 9, duration(seconds_left)),
        ]
        if utilisation is not None:
            columns.insert(-1, ("util", 5, f"{utilisation:.1%}"))
        if self._facts.has_perplexity:
            columns.insert(3, ("ppl", 6, compact(perplexity(line["loss"]), 2)))
        header = "  ".join(name.rjust(width) for name, width, _ in columns)
        row = "  ".join(text.rjust(width) for _, width, text in columns)
        self._rows += 1
        return [header, row] if self._rows % HEADER_EVERY == 1 else [row]

    def _write(self, event: str, **facts: Any) -> None:
        if self._file is not None:
            self._file.write(event, **facts)

    def _announce(self, kind: str, step: int, **facts: Any) -> None:
        details = ", ".join(str(facts[name]) for name in ("message", "path") if name in facts)
        self._say(f">> {kind} at step {step}" + (f": {details}" if details else ""))

    def _track(self, step: int, group: str, values: dict[str, Any]) -> None:
        known = {f"{group}/{name}": v for name, v in values.items() if v is not None}
        for tracker in self._trackers:
            tracker.log(step, known)
