"""Shell completion of values. Must not import torch: completion has to be instant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from megatron_olmo_bridge.formats.dtypes import KEEP
from megatron_olmo_bridge.formats.iterations import RELEASE, iteration_folders, iteration_number
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Complete one of these values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


dtypes = one_of(*ITEM_SIZE)
dtypes_or_keep = one_of(KEEP, *ITEM_SIZE)


def sizes(incomplete: str) -> list[str]:
    """Complete the name of a published size."""
    from megatron_olmo_bridge.models.families import published_sizes

    return [name for name in published_sizes() if name.startswith(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    """Complete the name of a recipe."""
    from megatron_olmo_bridge.training.named_recipes import named_recipes

    return [recipe.name for recipe in named_recipes() if recipe.name.startswith(incomplete)]


def iterations(context: typer.Context, incomplete: str) -> list[str]:
    """Complete an iteration of the checkpoint root that is already on the command line."""
    if not context.args:  # an option without its value stops click before it reads arguments
        return []
    root = Path(context.args[0]).expanduser()
    numbers = map(iteration_number, iteration_folders(root) if root.is_dir() else [])
    names = [RELEASE if number is None else str(number) for number in numbers]
    if context.info_name == "export":
        names.append("all")
    return [name for name in names if name.startswith(incomplete)]
