"""The shape of every command: the options that all have, the JSON envelope, errors, exit codes."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from megatron_olmo_bridge.errors import INTERRUPTED, BridgeError, fit_screen, missing_package

from .console import first_process, is_repeated, output
from .logs import logging_to

INTERNAL_ERROR = 70
"""Exit code of a fault of our own: EX_SOFTWARE of sysexits.h."""
BAD_USAGE = 2
DIFFERENT = "1 a difference was found"
"""Exit code of commands that compare, for ``register``."""
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""click's, or that of the copy of click which typer brings."""

_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, for scripts: docs/scripting.md.")
]
_Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say on standard error what happens.")
]
_LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", metavar="FILE", help="Append to it what happens, in detail."),
]
_COMMON: dict[str, tuple[Any, Any]] = {
    "quiet": (_Quiet, False), "json": (_Json, False), "verbose": (_Verbose, False),
    "log_file": (_LogFile, None),
}  # fmt: skip
"""Options that every command has: how typer declares each, and its default."""

KindOptions = Mapping[str, Any]
NO_KIND_OPTIONS: KindOptions = MappingProxyType({})
"""Default of a parameter ``kind_options``: on the command line it is an option for each option that
only one kind of checkpoint has."""


@dataclass(frozen=True)
class Outcome:
    """What a command did or found."""

    result: Any = None
    """What ``--json`` prints; may hold dataclasses and paths."""
    exit_code: int = 0
    """1 if the command looked for a difference and found one."""


@dataclass(frozen=True)
class Failure:
    """Why a command could not do its work."""

    type: str
    """Name of a class of errors.py, or of a built-in exception."""
    message: str
    exit_code: int = BAD_USAGE


def register(
    app: typer.Typer,
    name: str,
    function: Callable[..., Outcome],
    *,
    needs: tuple[str, ...] = (),
    exit_codes: str = "",
) -> None:
    """Make a function a command: with the options that all have, and one way to end.

    The function prints for people by ``console.say`` and ``console.table``, which are silent under
    ``--quiet`` and ``--json``, and returns what ``--json`` prints. Lines of its docstring under
    ``Examples:`` stand at the bottom of ``--help``.

    Args:
        needs: modules of extras without which the command can do nothing.
        exit_codes: those that only some commands have: ``1 a difference was found``.
    """
    own, kind_options = _with_kind_options(inspect.signature(function, eval_str=True))
    common = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=usual, annotation=kind)
        for option, (kind, usual) in _COMMON.items()
    ]
    parameters = [*own.parameters.values(), *common]
    required = any(p.default is inspect.Parameter.empty for p in own.parameters.values())

    def command(
        *, quiet: bool, json: bool, verbose: bool, log_file: Path | None, **arguments: Any
    ) -> None:
        def work() -> Outcome:
            with logging_to(verbose, log_file):
                for module in needs:
                    if find_spec(module) is None and (missing := missing_package(module)):
                        raise missing
                if kind_options:
                    named = {name: arguments.pop(name) for name in kind_options}
                    given = {name: value for name, value in named.items() if value is not None}
                    arguments["kind_options"] = given
                return function(**arguments)

        output.quiet, output.json, output.verbose = quiet, json, verbose
        # torch says so when it is imported; nothing that runs without NumPy misses it.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        try:
            code = _run(name, work, resumable="resume" in own.parameters)
        finally:
            output.quiet = output.json = output.verbose = False
        if code:
            raise typer.Exit(code)

    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    text, epilog = _help(function, exit_codes)
    app.command(name, help=text, epilog=epilog, no_args_is_help=required)(command)


def _with_kind_options(own: inspect.Signature) -> tuple[inspect.Signature, list[str]]:
    """Return a signature with its parameter ``kind_options`` written out, one a kind's option.

    Returns:
        The signature, and the names of the options; none where it has no such parameter.
    """
    if "kind_options" not in own.parameters:
        return own, []
    from megatron_olmo_bridge.checkpoints.open import kind_options

    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        if parameter.name != "kind_options":
            parameters.append(parameter)
            continue
        for option in kind_options():
            declared = typer.Option(min=option.minimum, help=option.help)
            kind = Annotated[option.type | None, declared]  # type: ignore[name-defined]
            parameters.append(parameter.replace(name=option.name, default=None, annotation=kind))
    return own.replace(parameters=parameters), [option.name for option in kind_options()]


def _help(function: Callable[..., Outcome], exit_codes: str) -> tuple[str, str]:
    """Return what ``--help`` says above the options, and below them.

    Lines are joined to paragraphs: rich would keep the ends of lines in some and not in others.
    """
    text, _, examples = (inspect.getdoc(function) or "").partition("\nExamples:\n")
    paragraphs = [" ".join(lines.split()) for lines in text.split("\n\n")]
    codes = [
        "0 done",
        "2 bad usage or input",
        "130 interrupted",
        *([exit_codes] * bool(exit_codes)),
    ]
    codes.sort(key=lambda code: int(code.split()[0]))
    below = [f"  {line.strip()}" for line in examples.splitlines() if line.strip()]
    if below:
        below.insert(0, "Examples:")
    return "\n\n".join(paragraphs), "\n\n".join([*below, f"Exit codes: {'; '.join(codes)}."])


class CommandGroup(TyperGroup):
    """The group of all commands. Bad usage is told in the JSON envelope where that is asked for."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line: see :meth:`typer.core.TyperGroup.main`."""
        words = list(sys.argv[1:] if args is None else args)
        flags = words[: words.index("--")] if "--" in words else words
        json = "--json" in flags
        alone = standalone_mode and not json  # typer then prints bad usage, and exits
        try:
            code = super().main(args, prog_name, complete_var, alone, windows_expand_args, **extra)
        except _UsageError as error:
            if not json:
                raise
            name = next((word for word in flags if word in self.commands), None)
            _print_envelope(sys.stdout, name, Failure("UsageError", error.format_message()))
            code = error.exit_code
        except SystemExit as end:
            if not isinstance(end.__context__, BrokenPipeError):
                raise
            code = _end_quietly()  # of the help, which rich prints
        return sys.exit(code) if standalone_mode else code


def _run(name: str, work: Callable[[], Outcome], resumable: bool) -> int:
    """Run a command, say what became of it, and return the exit code."""
    stdout = sys.stdout
    try:
        # What libraries print must not stand beside the JSON.
        with contextlib.redirect_stdout(sys.stderr if output.json else stdout):
            outcome = work()
        if output.json:
            _print_envelope(stdout, name, outcome.result)
        stdout.flush()
        return outcome.exit_code
    except BrokenPipeError:
        return _end_quietly()
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure = _explain(error, resumable)
        failure = replace(failure, message=fit_screen(failure.message))
        if output.json and first_process():
            _print_envelope(stdout, name, failure)
        elif not is_repeated(failure.message):
            sys.stderr.write(f"olmo-bridge: {failure.message}\n")
        return failure.exit_code


def _end_quietly() -> int:
    """Print nothing more: the reader of a pipe, `head` for example, has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _explain(error: BaseException, resumable: bool) -> Failure:
    kind = type(error).__name__
    if isinstance(error, BridgeError):
        return Failure(kind, str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        hint = " Run the same with --resume to continue." if resumable else ""
        return Failure("Interrupted", f"interrupted.{hint}", INTERRUPTED)
    if isinstance(error, ModuleNotFoundError):
        missing = missing_package(error.name or "")
        if missing is not None:
            return _explain(missing, resumable)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Failure(kind, f"{where}{error.strerror or error}")
    traceback.print_exception(error)
    return Failure(kind, f"a fault of olmo-bridge itself: {kind}: {error}", INTERNAL_ERROR)


def _print_envelope(stdout: TextIO, command: str | None, outcome: Any) -> None:
    """Print what a command found, or its failure, as the one JSON object of docs/scripting.md."""
    if not first_process():
        return
    failed = isinstance(outcome, Failure)
    envelope = {
        "command": command,
        "ok": not failed,
        "error": {"type": outcome.type, "message": outcome.message} if failed else None,
        "result": None if failed else _plain(outcome),
    }
    stdout.write(json.dumps(envelope, indent=2, allow_nan=False, default=str) + "\n")
    stdout.flush()


def _plain(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, null for NaN and infinity: JSON has neither."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not isfinite(value) else value
