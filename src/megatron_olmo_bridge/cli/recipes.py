"""The recipes command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_olmo_bridge.errors import InputError, nearest

from .command import Outcome, register
from .completion import recipe_names
from .console import say, table

if TYPE_CHECKING:
    from megatron_olmo_bridge.training.config import TrainingConfig
    from megatron_olmo_bridge.training.named_recipes import NamedRecipe

FITS = 75e9
"""Estimated bytes allowed on an 80 GB GPU; the rest is a margin for what is not estimated."""


@dataclass(frozen=True)
class RecipeSummary:
    """Row of the list of recipes."""

    name: str
    """Argument for ``olmo-bridge train``."""
    file: Path
    model: str | None
    """Published size or hub id; None where the command line names the model."""
    stage: int | None
    tokens: int
    """Tokens of the whole run."""
    gpus: int | None
    """Minimum number of 80 GB GPUs; None if the model is not known yet."""
    memory: int | None
    """Estimated bytes on the fullest GPU."""
    settings: list[str]
    """Fields that must be set on the command line."""


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    register(app, "recipes", recipes)


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Print this recipe or script.", autocompletion=recipe_names
        ),
    ] = None,
    path: Annotated[bool, typer.Option("--path", help="Print the path of NAME instead.")] = False,
) -> Outcome:
    """List the named recipes, or print one to copy and change.

    Examples:
        olmo-bridge recipes
        olmo-bridge recipes olmo2_1b > my_run.py
        olmo-bridge recipes slurm.sbatch > slurm.sbatch
    """
    if name is None:
        if path:
            raise InputError("--path prints the path of a recipe: name one")
        return Outcome(_list())
    file = _file(name)
    text = file.read_text()
    say(str(file) if path else text.rstrip("\n"))
    return Outcome({"file": file, "text": text})


def _file(name: str) -> Path:
    from megatron_olmo_bridge.training.named_recipes import other_files, recipe_files

    files = recipe_files() | other_files()
    stem = name.partition(":")[0]
    if stem not in files:
        raise InputError(
            f"no recipe or script is named {name!r}{nearest(stem, files) or '.'} Known are: "
            f"{', '.join(files)}"
        )
    return files[stem]


def _list() -> dict[str, list[RecipeSummary] | list[str]]:
    from megatron_olmo_bridge.training.monitor.human import short
    from megatron_olmo_bridge.training.named_recipes import named_recipes, other_files

    summaries = [_summary(recipe) for recipe in named_recipes()]
    rows = [
        [
            r.name,
            r.model or "",
            str(r.stage or ""),
            short(r.tokens),
            f"{r.gpus} x {r.memory / 1e9:.1f} GB" if r.gpus and r.memory else "",
            " ".join(r.settings),
        ]
        for r in summaries
    ]
    table(["recipe", "model", "stage", "tokens", "GPUs at least", "required settings"], rows)
    scripts = list(other_files())
    say(f"\nScripts: {', '.join(scripts)}.")
    say("olmo-bridge train NAME [KEY=VALUE]... trains one, olmo-bridge recipes NAME prints it.")
    return {"recipes": summaries, "scripts": scripts}


def _summary(recipe: NamedRecipe) -> RecipeSummary:
    from megatron_olmo_bridge.training.estimate import estimate
    from megatron_olmo_bridge.training.layout import Layout, minimum_processes
    from megatron_olmo_bridge.training.recipes import load_recipe
    from megatron_olmo_bridge.training.resolve import bridge_of

    from .dry_run import model_name

    config = load_recipe(recipe.name)
    gpus = memory = None
    model = config.init.hf
    if config.model:
        bridge = bridge_of(config)
        model = model_name(bridge)
        gpus = minimum_processes(config)
        while (memory := estimate(config, bridge, Layout.of(config, gpus)).worst.total) > FITS:
            gpus *= 2
    stage = re.match(r"stage(\d)", recipe.function)
    return RecipeSummary(
        name=recipe.name,
        file=recipe.file,
        model=model,
        stage=int(stage[1]) if stage else None,
        tokens=config.train.steps * config.tokens_per_step,
        gpus=gpus,
        memory=memory,
        settings=_settings(config),
    )


def _settings(config: TrainingConfig) -> list[str]:
    """Return the fields that the command line must set: the data and the starting weights."""
    begins = ["init.checkpoint"] if config.init.optimizer else []
    if config.classification is None:
        return [*begins, "data.path"]
    if not (config.model or config.init.hf):
        begins = ["init.hf"]
    return [*begins, "classification.train", "classification.validation"]
