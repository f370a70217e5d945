"""The fields of a dataclass become the options of a command."""

import json
from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.cli.command import CommandGroup, Outcome, register
from megatron_olmo_bridge.cli.options import KIND_OPTIONS, SHOWN, Omit, docstring
from megatron_olmo_bridge.convert.options import AverageOptions, ExportOptions, ImportOptions
from megatron_olmo_bridge.data.options import PrepareOptions
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.tools.against import ExpectedWeights

ALL = (
    ReadOptions,
    ImportOptions,
    ExportOptions,
    AverageOptions,
    WriteOptions,
    PrepareOptions,
    ExpectedWeights,
)


def convert(
    *,
    options: Annotated[ExportOptions, Omit("num_labels")],
    write: WriteOptions,
    dry_run: bool = False,
) -> Outcome:
    """Return the options that the function was called with."""
    return Outcome({"options": repr(options), "write": repr(write), "dry_run": dry_run})


def run(*arguments: str) -> Result:
    app = typer.Typer(cls=CommandGroup)
    app.callback()(lambda: None)
    register(app, "convert", convert)
    return CliRunner().invoke(app, ["convert", *arguments], env={"COLUMNS": "300"})


def called_with(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)["result"]


def test_without_options_the_dataclasses_have_their_defaults() -> None:
    assert called_with() == {
        "options": repr(ExportOptions()),
        "write": repr(WriteOptions()),
        "dry_run": False,
    }


def test_each_option_sets_its_field() -> None:
    arguments = "--iteration all --vocab-size 9 --heads 4 --dtype float16 -j 3 --checksum --dry-run"
    assert called_with(*arguments.split()) == {
        "options": repr(
            ExportOptions(iteration="all", vocab_size=9, kind_options={"heads": 4}, dtype="float16")
        ),
        "write": repr(WriteOptions(workers=3, checksum=True)),
        "dry_run": True,
    }


def test_the_help_is_the_docstring_of_the_field() -> None:
    text = run("--help").stdout
    assert "Rows to keep of a padded vocabulary" in text
    assert "A number, release or all." in text, "a field declared again has its own docstring"
    assert "num-labels" not in text, "omitted"


@pytest.mark.parametrize("cls", ALL)
def test_every_field_can_be_an_option(cls: type[Any]) -> None:
    """A new field has a docstring and an entry in ``SHOWN``."""
    for field in fields(cls):
        assert docstring(cls, field.name)
        if field.name != KIND_OPTIONS:
            assert field.name in SHOWN
    assert set(SHOWN) == {f.name for cls in ALL for f in fields(cls)} - {KIND_OPTIONS}


def test_a_field_without_a_docstring_is_named() -> None:
    @dataclass
    class Options:
        speed: int = 0

    with pytest.raises(AssertionError, match=r"Options\.speed has no docstring"):
        docstring(Options, "speed")
