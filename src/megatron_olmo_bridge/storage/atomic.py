"""Write files and folders atomically and durably."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a file or folder while it is written."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Values from Linux's <fcntl.h> and <linux/fs.h>."""


@contextlib.contextmanager
def name_in_errors(file: Path) -> Iterator[None]:
    """Add the file name to errors of calls on a file descriptor, which lack it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a file as ``NAME.partial``, sync it, and rename it.

    After a kill, the path has either the old or the new content, and there may be a
    ``NAME.partial``. After an error, it has the old content.

    Args:
        path: file to create or replace; its folder exists.
        data: content; text is encoded as UTF-8.

    Raises:
        OSError: the file can't be written.
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
    """Yield an empty folder ``NAME.partial`` to fill, and rename it when the block ends.

    After an error in the block, the path has the old folder. After a kill, it has either the old
    or the new one; if the file system can't exchange two names, there may be neither.

    Args:
        path: folder to create or replace.

    Raises:
        OSError: the folder can't be written.
    """
    partial, old = (path.with_name(f"{path.name}{suffix}{PARTIAL}") for suffix in ("", ".old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        if not exchange(partial, path):
            if path.exists():
                path.rename(old)
            partial.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; return False if the file system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return done == 0


def write_synced(path: Path, data: bytes | str) -> None:
    """Write and sync a file. A kill may leave it incomplete."""
    with name_in_errors(path), path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Sync the content of a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with name_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything in it."""
    for path in (folder, *folder.rglob("*")):
        sync(path)
