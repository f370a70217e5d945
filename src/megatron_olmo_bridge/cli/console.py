"""Output of commands: lines, tables and progress bars."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import escape
from megatron_olmo_bridge.storage.progress import Reporter

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Workers = Annotated[
    int, typer.Option("--workers", "-j", min=1, help="Threads. torchrun adds processes.")
]


@dataclass
class Output:
    """Output settings of the running command."""

    quiet: bool = False
    json: bool = False
    verbose: bool = False
    """Log lines go to standard error, so no progress bar is drawn."""

    @property
    def silent(self) -> bool:
        """True if lines and tables for people are suppressed, as in all processes but the first."""
        return self.quiet or self.json or not first_process()


output = Output()
"""Output settings of this process; command.py sets them when a command starts."""


def first_process() -> bool:
    """Return whether this is the process that prints (rank 0 under torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def is_repeated(message: str) -> bool:
    """Return whether another torchrun process on this node has already printed this message.

    Some errors occur in all processes at once and others in just one, so no process can be chosen
    in advance to print them. The processes coordinate through a file in torchrun's folder.
    """
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull))
    if error_file.name != "error.json":  # ATTEMPT/LOCAL_RANK/error.json
        return False
    digest = hashlib.sha256(message.encode(errors="replace")).hexdigest()
    try:
        (error_file.parents[1] / f"printed-{digest}").touch(exist_ok=False)
    except OSError as error:
        return isinstance(error, FileExistsError)
    return False


def show_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        typer.echo(f"olmo-bridge {__version__}")
        raise typer.Exit


def say(text: str) -> None:
    """Print a line, or several, for people. Control characters are escaped."""
    if not output.silent:
        typer.echo(escape(text, keep="\n\t"))


def table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table for people. Long names wrap; nothing is truncated."""
    if output.silent:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=False, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    out = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for column in out.columns:
        column.overflow = "fold"
    for row in rows:
        out.add_row(*(escape(cell, keep="\n") for cell in row))
    # Use echo: on a broken pipe rich would exit with 1, which means "a difference was found".
    with console.capture() as rendered:
        console.print(out)
    typer.echo(rendered.get(), nl=False)


def human_bytes(count: float) -> str:
    """Format a number of bytes: ``14.60 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


class ProgressBar(Reporter):
    """Show bytes done, rate and time left; silent if standard error is not a terminal."""

    def __init__(self) -> None:
        self._shown = not (output.silent or output.verbose) and sys.stderr.isatty()
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
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
