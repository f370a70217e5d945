"""The command that shows what a training run left behind: report."""

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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, with log.jsonl.")],
) -> Outcome:
    """Write RUN/report.html again, from RUN/log.jsonl: curves, key figures, config.

    Also while the run is in progress, or after it was killed.

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
