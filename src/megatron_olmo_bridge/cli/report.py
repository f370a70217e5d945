"""The report command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import Outcome, register
from .console import say


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    register(app, "report", report, needs=("matplotlib",))


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, with log.jsonl.")],
) -> Outcome:
    """Write RUN/report.html from RUN/log.jsonl: curves, key figures, config.

    Works during the run, and after it was killed.

    Examples:
        olmo-bridge report ./run
        olmo-bridge report ./run --json | jq .result.evaluation_loss
    """
    from megatron_olmo_bridge.training.monitor.history import RunHistory
    from megatron_olmo_bridge.training.monitor.report import write_report

    path = write_report(run)
    history = RunHistory.read(run)
    say(f"{history.sentence}\n{path}")
    return Outcome(history.figures() | {"report": path})
