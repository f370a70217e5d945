"""Commands of a training run: train, report."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import Outcome, register
from .completion import recipe_names
from .console import output, say

if TYPE_CHECKING:
    from megatron_olmo_bridge.training.config import TrainingConfig

STOPPED = "75 stopped when asked to, and saved"


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    register(
        app, "train", train, needs=("omegaconf", "megatron", "transformers"), exit_codes=STOPPED
    )
    register(app, "report", report, needs=("matplotlib",))


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A name listed by `olmo-bridge recipes`, or FILE.py, or FILE.py:FUNCTION.",
            autocompletion=recipe_names,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Config fields to override: parallel.tp=2."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            help="Start N processes here, as torchrun would; with --dry-run, estimate for N.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print config, memory, tokens and FLOPs; train nothing."),
    ] = False,
) -> Outcome:
    """Train a model from a recipe. Run the same command again to resume.

    On SIGTERM or Ctrl-C, the last step is saved before the run stops.

    Examples:
        olmo-bridge train olmo2_tiny data.path=data/text checkpoint.save=runs/first
        olmo-bridge train olmo2_1b parallel.tp=2 --dry-run
        torchrun --nproc_per_node 8 -m megatron_olmo_bridge train olmo2_7b data.path=data/text
    """
    from megatron_olmo_bridge.training.config import check_values
    from megatron_olmo_bridge.training.recipes import apply_overrides, load_recipe

    config = apply_overrides(load_recipe(recipe), overrides or [])
    if not config.init.checkpoint:  # which may fill in settings; resolve() checks them
        check_values(config)
    if dry_run:
        return Outcome(_dry_run(config, processes))
    if processes and processes > 1 and "RANK" not in os.environ:
        return Outcome(_start(processes, [recipe, *(overrides or [])]))
    return Outcome(_train(config))


def _train(config: TrainingConfig) -> dict[str, Any]:
    from megatron_olmo_bridge.runtime.launch import reporting_errors

    _no_warnings()
    from megatron_olmo_bridge.tasks.train import train

    with reporting_errors():
        return train(config, say=say)


def _no_warnings() -> None:
    if not sys.warnoptions:  # warnings of libraries are for developers
        warnings.simplefilter("ignore")


def _start(processes: int, arguments: list[str]) -> dict[str, Any] | None:
    from megatron_olmo_bridge.runtime.launch import processes as started

    flags = ["--quiet"] * output.quiet + ["--json"] * output.json
    command = ["train", *arguments, *flags]
    printed = []
    with started("megatron_olmo_bridge", command, processes, stoppable=True) as lines:
        for line in lines:
            if output.json:
                printed.append(line)
            else:
                typer.echo(line, nl=False)
    return json.loads("".join(printed))["result"] if output.json else None


def _dry_run(config: TrainingConfig, processes: int | None) -> dict[str, Any]:
    _no_warnings()
    from megatron_olmo_bridge.tasks.language_modelling import check_prepared
    from megatron_olmo_bridge.tasks.train import resolve_run
    from megatron_olmo_bridge.training.checkpoint import last_step
    from megatron_olmo_bridge.training.estimate import estimate
    from megatron_olmo_bridge.training.folder import check_folders
    from megatron_olmo_bridge.training.layout import minimum_processes

    from .dry_run import dry_run_result, print_dry_run

    count = processes or int(os.environ.get("WORLD_SIZE", "0")) or minimum_processes(config)
    resolved = resolve_run(config, count)
    config = resolved.config
    check_folders(config)
    if config.folder is not None:
        last_step(config.folder)
    if config.classification is None and (config.data.path or config.data.mix):
        check_prepared(resolved)
    elif config.classification is None:  # the rest can be estimated without data
        say("data.path is not set: the run itself needs data.path=PREFIX.\n")
    estimated = estimate(config, resolved.bridge, resolved.layout)
    print_dry_run(resolved, estimated)
    return dry_run_result(config, estimated)


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
