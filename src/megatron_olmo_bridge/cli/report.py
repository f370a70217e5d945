"""The command that shows what a training run left behind: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Json, Quiet, guarded, print_json, say


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    app.command("report", no_args_is_help=True)(guarded(report))


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, with log.jsonl.")],
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write RUN/report.html again, from RUN/log.jsonl: curves, key figures, config.

    Also while the run goes on, or after it was killed. Examples:

        olmo-bridge report ./run

        olmo-bridge report ./run --json | jq .evaluation_loss
    """
    from megatron_olmo_bridge.training.monitor.history import RunHistory
    from megatron_olmo_bridge.training.monitor.report import write_report

    path = write_report(run)
    history = RunHistory.read(run)
    if json:
        print_json(history.figures() | {"report": str(path)})
    else:
        say(f"{history.sentence}\n{path}", quiet)
