"""The command that trains."""

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
    from megatron_olmo_bridge.convert.source import Source
    from megatron_olmo_bridge.training.config import TrainingConfig

STOPPED = "75 stopped when asked to, and saved"


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    register(
        app, "train", train, needs=("omegaconf", "megatron", "transformers"), exit_codes=STOPPED
    )


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A name that `olmo-bridge recipes` lists, or FILE.py, or FILE.py:FUNCTION.",
            autocompletion=recipe_names,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the config: parallel.tp=2."),
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
    """Train a model as a recipe says. Start it again, and it resumes.

    Asked to stop (SIGTERM, Ctrl-C), it saves its last step first.

    Examples:
        olmo-bridge train olmo2_tiny data.path=data/text checkpoint.save=runs/first
        olmo-bridge train olmo2_1b parallel.tp=2 --dry-run
        torchrun --nproc_per_node 8 -m megatron_olmo_bridge train olmo2_7b data.path=data/text
    """
    from megatron_olmo_bridge.training.check import check_values
    from megatron_olmo_bridge.training.recipes import apply_overrides, load_recipe

    config = apply_overrides(load_recipe(recipe), overrides or [])
    check_values(config)
    if dry_run:
        return Outcome(_dry_run(config, processes))
    if processes and processes > 1 and "RANK" not in os.environ:
        return Outcome(_start(processes, [recipe, *(overrides or [])]))
    return Outcome(_train(config))


def _train(config: TrainingConfig) -> dict[str, Any]:
    from megatron_olmo_bridge.runtime.launch import reporting_errors

    _no_warnings()
    if config.classification is None:
        from megatron_olmo_bridge.training.train import train as run
    else:
        from megatron_olmo_bridge.classification.train import train as run

    with reporting_errors():
        return run(config, say=say)


def _no_warnings() -> None:
    if not sys.warnoptions:  # libraries' warnings are for those who change the code
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
    from megatron_olmo_bridge.training.checkpoint import last_step
    from megatron_olmo_bridge.training.estimate import estimate
    from megatron_olmo_bridge.training.folder import check_folders
    from megatron_olmo_bridge.training.layout import checks, smallest

    from .dry_run import dry_run_result, print_dry_run

    config, source = _resolved(config)
    count = processes or int(os.environ.get("WORLD_SIZE", "0")) or smallest(config)
    checks(config, count)
    check_folders(config)
    if config.checkpoint.save:
        last_step(Path(config.checkpoint.save).expanduser())
    _check_data(config, source)
    found = estimate(config, count)
    print_dry_run(config, found)
    return dry_run_result(config, found)


def _resolved(config: TrainingConfig) -> tuple[TrainingConfig, Source | None]:
    """The config as the run fills it in, and the checkpoint that the weights come from, if any."""
    from megatron_olmo_bridge.classification.data import load_examples
    from megatron_olmo_bridge.classification.train import resolved as resolved_classifier
    from megatron_olmo_bridge.training.train import resolved

    if config.classification is None or not config.classification.train:
        return resolved(config)
    train, _ = load_examples(config.classification)
    return resolved_classifier(config, train.classes)


def _check_data(config: TrainingConfig, source: Source | None) -> None:
    """Refuse data that the run would refuse. Without data, the rest can be reckoned still."""
    from megatron_olmo_bridge.training.layout import model_of
    from megatron_olmo_bridge.training.token_data import check_data
    from megatron_olmo_bridge.training.train import tokenizer_folder

    if config.classification is not None:
        return
    if config.data.path:
        vocab_size, length = model_of(config).vocab_size, config.train.sequence_length
        tokenizer_folder(config, source, check_data(config.data, vocab_size, length))
    else:
        say("No data is named yet: the run itself needs data.path=PREFIX.\n")
