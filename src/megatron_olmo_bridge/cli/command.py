"""What all commands share: common options, the JSON envelope, errors, exit codes."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from megatron_olmo_bridge.errors import INTERRUPTED, BridgeError, fit_screen, missing_package

from .console import first_process, is_repeated, output
from .logs import logging_to
from .options import find_options

INTERNAL_ERROR = 70
"""Exit code for a bug in olmo-bridge: EX_SOFTWARE of sysexits.h."""
BAD_USAGE = 2
DIFFERENT = "1 a difference was found"
"""``exit_codes`` of commands that compare, for :func:`register`."""
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""click's UsageError, or that of the copy of click vendored by typer."""

_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
_Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, for scripts: docs/scripting.md.")
]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log progress to standard error.")]
_LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", metavar="FILE", help="Append a detailed log to FILE."),
]
_COMMON: dict[str, tuple[Any, Any]] = {
    "quiet": (_Quiet, False), "json": (_Json, False), "verbose": (_Verbose, False),
    "log_file": (_LogFile, None),
}  # fmt: skip
"""Options of every command: the typer declaration and the default of each."""


@dataclass(frozen=True)
class Outcome:
    """Result of a command."""

    result: Any = None
    """What ``--json`` prints; may hold dataclasses and paths."""
    exit_code: int = 0
    """1 if the command compares and found a difference."""


@dataclass(frozen=True)
class Failure:
    """Reason a command failed."""

    type: str
    """Exception class: one of errors.py, or a built-in."""
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
    """Register a function as a command, with the common options and error handling.

    The function prints for people with ``console.say`` and ``console.table``, silent under
    ``--quiet`` and ``--json``, and returns what ``--json`` prints. Lines of its docstring under
    ``Examples:`` go to the bottom of ``--help``.

    Args:
        needs: modules from optional extras that the command requires.
        exit_codes: exit codes specific to this command, such as ``1 a difference was found``.
    """
    own = inspect.signature(function, eval_str=True)
    dataclasses = find_options(own)
    common = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=usual, annotation=kind)
        for option, (kind, usual) in _COMMON.items()
    ]
    parameters = [
        shown
        for p in own.parameters.values()
        for shown in (dataclasses[p.name].parameters if p.name in dataclasses else [p])
    ]
    parameters += common
    required = any(p.default is inspect.Parameter.empty for p in parameters)

    def command(
        *, quiet: bool, json: bool, verbose: bool, log_file: Path | None, **arguments: Any
    ) -> None:
        def work() -> Outcome:
            with logging_to(verbose, log_file):
                for module in needs:
                    if find_spec(module) is None and (missing := missing_package(module)):
                        raise missing
                for options in dataclasses.values():
                    options.collect(arguments)
                return function(**arguments)

        output.quiet, output.json, output.verbose = quiet, json, verbose
        # torch warns if NumPy is missing; these commands don't need NumPy.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        try:
            code = _run(name, work, resumable="resume" in arguments)
        finally:
            output.quiet = output.json = output.verbose = False
        if code:
            raise typer.Exit(code)

    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    text, epilog = _help(function, exit_codes)
    app.command(name, help=text, epilog=epilog, no_args_is_help=required)(command)


def _help(function: Callable[..., Outcome], exit_codes: str) -> tuple[str, str]:
    """Return the help texts above and below the options.

    Lines are joined into paragraphs because rich keeps line breaks in only some of them.
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
    """Group of all commands. With ``--json``, bad usage is reported in the envelope too."""

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
            code = _end_quietly()  # while rich was printing the help
        return sys.exit(code) if standalone_mode else code


def _run(name: str, work: Callable[[], Outcome], resumable: bool) -> int:
    """Run a command, print its envelope or error, and return the exit code."""
    stdout = sys.stdout
    try:
        # Keep the output of libraries out of the JSON on stdout.
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
    """Stop printing because the reader of the pipe (`head`, for example) has closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _explain(error: BaseException, resumable: bool) -> Failure:
    kind = type(error).__name__
    if isinstance(error, BridgeError):
        return Failure(kind, str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        hint = " Run the same command with --resume to continue." if resumable else ""
        return Failure("Interrupted", f"interrupted.{hint}", INTERRUPTED)
    if isinstance(error, ModuleNotFoundError):
        missing = missing_package(error.name or "")
        if missing is not None:
            return _explain(missing, resumable)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Failure(kind, f"{where}{error.strerror or error}")
    traceback.print_exception(error)
    return Failure(kind, f"a bug in olmo-bridge: {kind}: {error}", INTERNAL_ERROR)


def _print_envelope(stdout: TextIO, command: str | None, outcome: Any) -> None:
    """Print the outcome or failure as the JSON envelope described in docs/scripting.md."""
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
    """Convert to JSON types: dataclasses to objects, tuples to lists, NaN and infinity to null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not isfinite(value) else value
