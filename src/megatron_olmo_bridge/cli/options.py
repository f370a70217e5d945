"""Options of a command that are the fields of a dataclass.

A command takes the dataclass as one parameter, ``options: ExportOptions``. On the command line it
becomes one option for each field, with the field's name, default and docstring. So a function in
Python and its command take the same options.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from megatron_olmo_bridge.checkpoints.open import kind_options
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.storage.cloning import MODES

from .completion import dtypes_or_keep, iterations, one_of

KIND_OPTIONS = "kind_options"
"""Name of the field for options of one kind of checkpoint. Each becomes an option of its own."""


def numbers(text: str | None) -> list[float] | None:
    """Return the numbers of ``0.5,0.25,0.25``."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text}: not a list of numbers such as 0.5,0.25,0.25") from None


@dataclass(frozen=True)
class Shown:
    """How a field appears on the command line."""

    type: Any
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of :func:`typer.Option`."""
    short: tuple[str, ...] = ()
    convert: Callable[[Any], Any] = lambda value: value
    """Converts the value of the option to that of the field."""


_COUNT = {"min": 1}
SHOWN = {
    "against": Shown(Path | None, {"metavar": "FILE"}),
    "checksum": Shown(bool),
    "dtype": Shown(str, {"autocompletion": dtypes_or_keep}),
    "fingerprint": Shown(str | None, {"metavar": "HASH"}),
    "hf_config": Shown(Path | None, {"metavar": "DIR"}),
    "iteration": Shown(str | None, {"autocompletion": iterations}),
    "make_vocab_size_divisible_by": Shown(int, _COUNT),
    "max_connections": Shown(int, _COUNT),
    "max_shard_size": Shown(str),
    "num_labels": Shown(int | None, _COUNT),
    "optimizer": Shown(bool),
    "overwrite": Shown(bool),
    "reflink": Shown(str, {"autocompletion": one_of(*MODES)}),
    "release": Shown(bool),
    "resume": Shown(bool),
    "revision": Shown(str | None),
    "sample": Shown(int | None, {"min": 1, "metavar": "N"}),
    "seed": Shown(int | None),
    "skip_bad_lines": Shown(bool),
    "text_field": Shown(str),
    "to": Shown(str, {"autocompletion": one_of("hf", "olmo-core")}),
    "token_dtype": Shown(str | None, {"autocompletion": one_of("uint16", "uint32")}),
    "tokenizer": Shown(str, {"metavar": "DIR_OR_ID"}),
    "txt_documents": Shown(str, {"autocompletion": one_of("line", "file")}),
    "vocab_size": Shown(int | None, _COUNT),
    "weights": Shown(str | None, {"metavar": "0.5,0.25,0.25"}, convert=numbers),
    "workers": Shown(int, _COUNT, short=("-j",)),
}
"""Every field that a command offers, by its name."""


class Omit:
    """Marks the fields of a dataclass that a command does not offer."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Options:
    """The options that replace a parameter whose type is a dataclass: one for each field."""

    def __init__(self, parameter: inspect.Parameter, cls: type[Any], omit: set[str]) -> None:
        self.name = parameter.name
        self._cls = cls
        offered = [f for f in fields(cls) if f.name not in omit]
        self._fields = [f.name for f in offered if f.name != KIND_OPTIONS]
        has_kinds = any(f.name == KIND_OPTIONS for f in offered)
        self._kind_options = [o.name for o in kind_options()] if has_kinds else []
        self.parameters = [
            parameter.replace(name=name, default=default, annotation=annotation)
            for f in offered
            for name, default, annotation in _declared(cls, f)
        ]

    def collect(self, arguments: dict[str, Any]) -> None:
        """Replace the values of the options in ``arguments`` by the dataclass."""
        values = {name: SHOWN[name].convert(arguments.pop(name)) for name in self._fields}
        own = {name: arguments.pop(name) for name in self._kind_options}
        if own:
            values[KIND_OPTIONS] = {n: value for n, value in own.items() if value is not None}
        arguments[self.name] = self._cls(**values)


def find_options(signature: inspect.Signature) -> dict[str, Options]:
    """Return, for each parameter whose type is a dataclass, the options that replace it."""
    found = {}
    for parameter in signature.parameters.values():
        cls, *marks = get_args(parameter.annotation) or [parameter.annotation]
        if isinstance(cls, type) and is_dataclass(cls):
            omitted = {name for mark in marks if isinstance(mark, Omit) for name in mark.names}
            found[parameter.name] = Options(parameter, cls, omitted)
    return found


def _declared(cls: type[Any], f: Field[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, default and annotation of each option that a field stands for."""
    if f.name == KIND_OPTIONS:
        for own in kind_options():
            declaration = typer.Option(min=own.minimum, help=own.help)
            yield own.name, None, Annotated[own.type | None, declaration]
        return
    shown = SHOWN[f.name]
    names = (f"--{f.name.replace('_', '-')}", *shown.short)
    declaration = typer.Option(*names, help=docstring(cls, f.name), **shown.settings)
    default = inspect.Parameter.empty if f.default is MISSING else f.default
    yield f.name, default, Annotated[shown.type, declaration]


def docstring(cls: type[Any], name: str) -> str:
    """Return the text below a field of a dataclass, without its backquotes."""
    for base in cls.__mro__[:-1]:
        if name in (texts := _docstrings(base)):
            return texts[name]
    raise AssertionError(f"{cls.__name__}.{name} has no docstring")


@cache
def _docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the text below each field that a class itself declares."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for declared, below in zip(body.body, body.body[1:], strict=False):
        match declared, below:
            case (
                ast.AnnAssign(target=ast.Name(id=str(name))),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                texts[name] = " ".join(text.replace("``", "").split())
    return texts
