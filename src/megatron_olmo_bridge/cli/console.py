"""What all commands share: how they print, show progress, and end."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.convert.reporter import Reporter
from megatron_olmo_bridge.errors import BridgeError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

P = ParamSpec("P")
EXTRAS = {
    "megatron": ("megatron", "transformers", "tokenizers", "numpy"),
    "train": ("omegaconf", "pyarrow", "matplotlib", "tensorboard"),
}
"""Extras, and packages that come with them and that only some commands need."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
Workers = Annotated[
    int, typer.Option("--workers", "-j", min=1, help="Threads. torchrun adds processes.")
]


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors end it with one clear message and the right exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BridgeError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted. A conversion can be continued with --resume.", 130)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            extra = next((name for name, has in EXTRAS.items() if package in has), None)
            if extra is None:
                raise
            fail(f"this needs {error.name}: pip install 'megatron-olmo-bridge[{extra}]'", 2)
        except BrokenPipeError:  # the reader, `head` for example, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", 2)

    return run


def fail(message: str, code: int) -> None:
    """Print an error and leave."""
    sys.stderr.write(f"olmo-bridge: {message}\n")
    raise typer.Exit(code)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"olmo-bridge {__version__}")
        raise typer.Exit


def say(text: str, quiet: bool = False) -> None:
    """A line for people."""
    if not quiet:
        typer.echo(text)


def print_json(value: Any) -> None:
    """A value for scripts."""
    typer.echo(json.dumps(value, indent=2))


def table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """A table on standard output. Long names fold; nothing is cut off."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=False, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    out = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for column in out.columns:
        column.overflow = "fold"
    for row in rows:
        out.add_row(*row)
    # Printed by echo: rich ends a broken pipe with exit code 1, "a difference was found".
    with console.capture() as rendered:
        console.print(out)
    typer.echo(rendered.get(), nl=False)


def human_bytes(count: float) -> str:
    """``14.60 GB``"""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


class ProgressBar(Reporter):
    """Bytes done, rate and time left on the terminal; silent where standard error is none."""

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        if not self._shown:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task(what, total=total)

    def advance(self, done: int) -> None:
        if self._progress is not None and self._task is not None:
            with self._lock:
                self._progress.advance(self._task, done)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
