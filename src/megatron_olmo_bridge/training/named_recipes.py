"""Recipes in the package, and their names. Files are read but not executed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"
"""The recipes; in a checkout, a link to the folder recipes/."""
_FUNCTION = re.compile(r"^def ([a-z]\w*)\(\) -> TrainingConfig:", re.MULTILINE)


@dataclass(frozen=True)
class NamedRecipe:
    """A function of a file in :data:`FOLDER` that returns a config."""

    name: str
    """``olmo2_1b`` for the first function of the file, ``olmo2_1b:stage2`` for a further one."""
    file: Path
    function: str


def named_recipes() -> list[NamedRecipe]:
    """Return all named recipes, sorted by file."""
    return [
        NamedRecipe(file.stem + (f":{function}" if i else ""), file, function)
        for file in sorted(FOLDER.glob("*/*.py"))
        for i, function in enumerate(_FUNCTION.findall(file.read_text()))
    ]


def recipe_files() -> dict[str, Path]:
    """Return the recipe files, by the name of their first function."""
    return {recipe.file.stem: recipe.file for recipe in named_recipes()}


def other_files() -> dict[str, Path]:
    """Return scripts and shared modules, by file name."""
    names = {"__init__.py", *(file.name for file in recipe_files().values())}
    files = sorted(FOLDER.glob("[!_]*/*"))  # not those of __pycache__
    return {file.name: file for file in files if file.is_file() and file.name not in names}
