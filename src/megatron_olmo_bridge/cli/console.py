"""How commands print and show progress."""

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
    """What the running command may print."""

    quiet: bool = False
    json: bool = False
    verbose: bool = False
    """Lines on standard error say what happens; no progress bar is drawn over them."""

    @property
    def silent(self) -> bool:
        """Whether lines and tables for people are left out: also in processes that aren't first."""
        return self.quiet or self.json or not first_process()


output = Output()
"""Of this process. Each command sets it when it starts: see command.py."""


def first_process() -> bool:
    """Whether this process is the one of torchrun's that prints."""
    return os.environ.get("RANK", "0") == "0"


def is_repeated(message: str) -> bool:
    """Whether another of the processes that torchrun started on this node has printed the same.

    A refusal is often found by all of them at once, another error by one alone: so which process is
    to print it can't be said beforehand. A file tells them, in a folder that torchrun has made.
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
    """Print the version and leave."""
    if wanted:
        typer.echo(f"olmo-bridge {__version__}")
        raise typer.Exit


def say(text: str) -> None:
    """Print a line, or several, for people. Control characters are escaped."""
    if not output.silent:
        typer.echo(escape(text, keep="\n\t"))


def table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table for people. Long names fold; nothing is cut off."""
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
