"""Files that are there whole or not at all, and durable when they are there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
"""Ends the name of a file or folder while it is written."""


@contextlib.contextmanager
def name_in_errors(file: Path) -> Iterator[None]:
    """Name the file in errors of calls on its descriptor, which don't."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a file under another name and, when it is durable, rename it.

    A kill at any moment leaves the file of before, or the new one, and at most ``NAME.partial``
    beside it. An error leaves the file of before alone.

    Args:
        path: Where the file is to be, in place of one that is there; its folder exists.
        data: The content; text is encoded as UTF-8.

    Raises:
        OSError: It can't be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write_synced(partial, data)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def write_synced(path: Path, data: bytes | str) -> None:
    """Write a file and make its bytes durable; a kill may leave half of it."""
    with name_in_errors(path), path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with name_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
