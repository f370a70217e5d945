"""Recipes by name: listed, printed, found."""

from __future__ import annotations

import compileall
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("omegaconf")

from typer.testing import CliRunner, Result

from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.training.named_recipes import FOLDER, named_recipes, other_files
from megatron_olmo_bridge.training.recipes import load_recipe

REPOSITORY = Path(__file__).parents[3]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def result_of(*args: object) -> Any:
    """What ``--json`` printed of a command that did its work."""
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["result"]


def test_the_package_has_the_recipes_of_the_repository() -> None:
    assert FOLDER.resolve() == REPOSITORY / "recipes"


def test_recipes_lists_what_every_recipe_needs() -> None:
    listed = {recipe["name"]: recipe for recipe in result_of("recipes")["recipes"]}
    assert list(listed) == [recipe.name for recipe in named_recipes()]
    assert listed["olmo2_7b:stage2"] == {
        "name": "olmo2_7b:stage2",
        "file": str(FOLDER / "olmo2" / "olmo2_7b.py"),
        "model": "olmo2-7b",
        "stage": 2,
        "tokens": 11_931 * 1024 * 4096,
        "gpus": 4,
        "memory": listed["olmo2_7b"]["memory"],
        "settings": ["init.checkpoint", "data.path"],
    }
    assert listed["olmo2_7b"]["settings"] == ["data.path"]
    assert all(r["memory"] < 75e9 for r in listed.values() if r["gpus"])
    assert listed["complaints:tiny"]["model"] is None
    assert listed["complaints:tiny"]["settings"] == [
        "init.hf",
        "classification.train",
        "classification.validation",
    ]


def test_the_list_is_a_table() -> None:
    lines = run("recipes").stdout.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("olmo2_13b:stage2_300b")]
    assert row[:4] == ["olmo2_13b:stage2_300b", "olmo2-13b", "2", "300B"]
    assert "Scripts: slurm.sbatch, torchrun.sh, " in "\n".join(lines)


@pytest.mark.parametrize("name", ["olmo2_1b", "olmo2_1b:stage2"])
def test_a_recipe_is_printed_unchanged(name: str) -> None:
    text = (REPOSITORY / "recipes/olmo2/olmo2_1b.py").read_text()
    assert run("recipes", name).stdout == text
    assert result_of("recipes", name) == {"file": str(FOLDER / "olmo2/olmo2_1b.py"), "text": text}
    assert run("recipes", name, "--path").stdout == f"{FOLDER / 'olmo2/olmo2_1b.py'}\n"


def test_scripts_have_names_and_compiled_files_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "recipes"
    shutil.copytree(FOLDER, installed)
    assert compileall.compile_dir(installed, quiet=1)
    monkeypatch.setattr(f"{other_files.__module__}.FOLDER", installed)
    assert list(other_files()) == [
        "slurm.sbatch",
        "torchrun.sh",
        "olmo2_common.py",
        "make_text.py",
        "train_tokenizer.py",
    ]


@pytest.mark.parametrize("name", list(other_files()))
def test_scripts_are_printed_unchanged(name: str) -> None:
    assert run("recipes", name).stdout == other_files()[name].read_text()


@pytest.mark.parametrize("recipe", named_recipes(), ids=lambda recipe: recipe.name)
def test_a_printed_recipe_runs_from_another_folder(recipe: Any, tmp_path: Path) -> None:
    copy = tmp_path / "mine.py"
    copy.write_text(run("recipes", recipe.name).stdout)
    assert load_recipe(f"{copy}:{recipe.function}") == load_recipe(recipe.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes", "olmo_1b"), "no recipe or script is named 'olmo_1b'; did you mean 'olmo2_1b'"),
        (("recipes", "slurm"), "did you mean 'slurm.sbatch'"),
        (("recipes", "--path"), "name one"),
        (("train", "olmo_1b"), "olmo_1b: no such recipe; did you mean 'olmo2_1b'"),
        (("train", "recipes/olmo2/olmo2_1b.py"), "did you mean 'olmo2_1b'"),
        (("train", "olmo2_1b:stage3"), "no function 'stage3'; did you mean 'stage2'"),
        (("train", "zzz"), "zzz: no such recipe. `olmo-bridge recipes` lists those"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_train_accepts_a_name_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_file = result_of("train", REPOSITORY / "recipes/olmo2/olmo2_tiny.py", "--dry-run")
    monkeypatch.chdir(tmp_path)
    assert result_of("train", "olmo2_tiny", "--dry-run") == by_file
