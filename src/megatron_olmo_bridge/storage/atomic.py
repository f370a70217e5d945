"""Files and folders that are there whole or not at all, and durable when they are there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
"""Ends the name of a file or folder while it is written."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Values from Linux's <fcntl.h> and <linux/fs.h>."""


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


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty ``NAME.partial`` to fill, which takes the name when the block has ended.

    An error in the block leaves the folder of before alone. So does a kill; only where the file
    system can't exchange two names, there is a moment in which neither has the name.

    Args:
        path: Where the folder is to be, in place of one that is there.

    Raises:
        OSError: It can't be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        if not exchange(partial, path):
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system can't."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return done == 0


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


def sync_tree(folder: Path) -> None:
    """Make a folder durable with all that is in it."""
    for path in (folder, *folder.rglob("*")):
        sync(path)
