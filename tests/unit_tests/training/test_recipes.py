"""Recipes as files, and overrides of what they return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("omegaconf")

from megatron_olmo_bridge.errors import InputError, nearest
from megatron_olmo_bridge.training.config import (
    ClassificationConfig,
    StepsConfig,
    TrainingConfig,
)
from megatron_olmo_bridge.training.recipes import (
    apply_overrides,
    as_dict,
    config_fields,
    from_dict,
    load_recipe,
)

RECIPE = """
from megatron_olmo_bridge.training.config import StepsConfig, TrainingConfig
from megatron_olmo_bridge.errors import UnsupportedError

def config():
    return TrainingConfig(train=StepsConfig(steps=7))

def longer():
    run = config()
    run.train.steps = 70
    return run

def _helper(): ...

def three():
    return 3

def fails():
    return {}["x"]

def refuses():
    raise UnsupportedError("not here")
"""


def base() -> TrainingConfig:
    return TrainingConfig(
        model={"vocab_size": 100, "hidden_size": 8},
        train=StepsConfig(steps=5),
        sources={"train": "a paper"},
    )


def changed(*overrides: str) -> Any:
    return apply_overrides(base(), overrides)


# --------------------------------------------------------------------------------------- recipes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    return path


def test_a_file_and_a_function_of_it(file: Path) -> None:
    assert load_recipe(str(file)).train.steps == 7
    assert load_recipe(f"{file}:longer").train.steps == 70


def test_recipes_of_a_folder_share_modules(file: Path) -> None:
    (file.parent / "shared_by_recipes.py").write_text("steps = 3")
    file.write_text(f"from shared_by_recipes import steps\n{RECIPE.replace('=7', '=steps')}")
    assert load_recipe(str(file)).train.steps == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":confg", "no function 'confg'; did you mean 'config'.* has config, longer, three, fails"),
        (":three", "returns a int, not a TrainingConfig"),
        (":fails", "the recipe fails: KeyError: 'x'"),
        (".bak", "no such recipe"),
    ],
)
def test_recipes_that_are_none(file: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(f"{file}{name}")


def test_an_error_of_ours_in_a_recipe_stays_what_it_is(file: Path) -> None:
    from megatron_olmo_bridge.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="not here"):
        load_recipe(f"{file}:refuses")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def (:", r"mine\.py: can't be run: SyntaxError: .*line 1"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("config = 3", "no function 'config'.* it has none"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(str(tmp_path / "mine.py"))


def test_a_recipe_is_a_python_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 3")
    with pytest.raises(InputError, match="a recipe is a Python file"):
        load_recipe(str(tmp_path / "mine.yaml"))


# ------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.steps=9", "train.steps", 9),
        ("train.steps = 9", "train.steps", 9),
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("parallel.sp=true", "parallel.sp", True),
        ("parallel.vpp=2", "parallel.vpp", 2),
        ("parallel.vpp=null", "parallel.vpp", None),
        ("checkpoint.save=runs/a b=c", "checkpoint.save", "runs/a b=c"),
        ("checkpoint.save=", "checkpoint.save", None),
        ("checkpoint.save=7", "checkpoint.save", "7"),
        ("name=mine", "name", "mine"),
        ("data.path=a", "data.path", ["a"]),
        ("data.path=[a,b/c]", "data.path", ["a", "b/c"]),
        ("data.path=[]", "data.path", []),
        ("data.weights=[1,0.5]", "data.weights", [1.0, 0.5]),
        ("data.weights=2", "data.weights", [2.0]),
        ("data.weights=null", "data.weights", None),
        ("provider.attention_dropout=0.1", "provider", {"attention_dropout": 0.1}),
        ("model.vocab_size=50", "model", {"vocab_size": 50, "hidden_size": 8}),
        ("model={}", "model", {}),
        ("classification.patience=3", "classification.patience", 3),
    ],
)
def test_an_override(override: str, field: str, value: Any) -> None:
    found = changed(override)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_one_counts_and_all_are_noted() -> None:
    found = changed("train.steps=9", "train.seed=3", "train.steps=11")
    assert (found.train.steps, found.train.seed) == (11, 3)
    assert found.sources == {
        "train": "a paper",
        "train.steps": "command line",
        "train.seed": "command line",
    }


def test_what_is_overridden_is_a_copy() -> None:
    config = base()
    apply_overrides(config, ["train.steps=9", "model.vocab_size=50"])
    assert config == base()


def test_a_section_that_was_not_there_begins_with_its_defaults() -> None:
    assert base().classification is None
    assert changed("classification.patience=3").classification == ClassificationConfig(patience=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "'train.steps': an override reads section.field=value"),
        ("train.stepz=3", "no field 'train.stepz'; did you mean 'train.steps'.*--dry-run"),
        ("steps=3", "did you mean 'train.steps'"),
        ("zzz=3", r"no field 'zzz' \(`--dry-run`"),
        ("train=3", "no field 'train'"),
        ("train.steps.more=3", "no field 'train.steps.more'"),
        ("model.vocabsize=3", "no field 'model.vocabsize' in the model's.* 'model.vocab_size'"),
        ("train.steps=some", "train.steps: .*'some'.*Integer"),
        ("train.steps=1.5", "train.steps: .*'1.5'"),
        ("train.steps=null", "train.steps: .*None"),
        ("train.steps=[1", r"train.steps=\[1: "),
        ("parallel.sp=perhaps", "parallel.sp: .*'perhaps'.*bool"),
        ("data.weights=[a]", "data.weights.*: .*'a'.*Float"),
        ("data.path=null", "data.path: "),
    ],
)
def test_overrides_that_can_not_be(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        changed(override)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------ as a dict


def test_there_and_back() -> None:
    config = changed("classification.text=body", "data.path=[a,b]", "provider.x=1")
    values = as_dict(config)
    assert values["data"]["path"] == ["a", "b"] and type(values["data"]["path"]) is list
    assert from_dict(values) == config


def test_a_value_of_another_type() -> None:
    values = as_dict(base())
    values["train"]["steps"] = "many"
    with pytest.raises(InputError, match=r"train\.steps"):
        from_dict(values)


def test_each_field_of_the_config_has_one_key() -> None:
    names = list(config_fields())
    assert {"name", "model", "train.steps", "classification.patience", "data.path"} <= set(names)
    assert len(set(names)) == len(names)
    assert not {"train", "classification", "steps"} & set(names)


def test_nearest() -> None:
    assert nearest("stepz", ["steps", "seed"]) == "; did you mean 'steps'?"
    assert nearest("quite another", ["steps", "seed"]) == ""
