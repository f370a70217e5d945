"""Paths of files that are somewhere else, with the part of :mod:`pathlib` that readers use."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar, cast

from megatron_olmo_bridge.errors import InputError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Status(NamedTuple):
    """Size of a file, and what changes with its content, for example an ETag."""

    st_size: int
    tag: str


class RemoteFiles(Protocol):
    """Files below one address. Each is pinned when it is first seen: a changed one is an error."""

    address: str
    """Address that opens the same files again; may hold credentials, so it is never shown."""
    url: str
    """Address for messages and records, without credentials."""
    connections: int
    """Number of requests in flight."""

    def status(self, key: str) -> Status | None:
        """Return the size and identity of a file; None if there is none."""

    def known(self, folder: str) -> list[str]:
        """Return the keys of the files below a folder, as far as they can be found."""

    def has_folder(self, key: str) -> bool:
        """Return whether there is a file below a folder."""

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return bytes of a file; for headers, so small ranges are read ahead and kept."""

    def read_into(
        self, key: str, offset: int, out: memoryview, pause: Callable[[float], Any]
    ) -> None:
        """Fill ``out`` with bytes of a file; ``pause`` waits before another attempt."""

    def stream(
        self, key: str, offset: int, length: int, buffer: memoryview, pause: Callable[[float], Any]
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range as they arrive, in ``buffer``, which the next overwrite."""

    def check_unchanged(self) -> None:
        """Raise InputError if a file that was read is not the same any more."""


@dataclass(frozen=True)
class RemotePath:
    """File or folder below an address; a path like those of :mod:`pathlib`."""

    files: RemoteFiles
    key: str = ""
    """Path below the address, with slashes; empty for the address itself."""

    def __str__(self) -> str:
        return f"{self.files.url}/{self.key}" if self.key else self.files.url

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(self.files, str(PurePosixPath(self.key) / name))

    @property
    def address(self) -> str:
        """Address that opens this path again; may hold credentials, so it is never shown."""
        address, mark, query = self.files.address.partition("?")
        return f"{address}/{self.key}{mark}{query}" if self.key else self.files.address

    @property
    def name(self) -> str:
        return PurePosixPath(self.key or self.files.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """Folder of this path; the address is its own."""
        parent = str(PurePosixPath(self.key).parent)
        return RemotePath(self.files, "" if parent == "." else parent)

    def resolve(self) -> RemotePath:
        """Return the path itself: there are no links."""
        return self

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        """Return the path below a folder."""
        return PurePosixPath(self.key).relative_to(folder.key)

    def exists(self) -> bool:
        """Return whether there is such a file or folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return whether there is such a file."""
        return bool(self.key) and self.files.status(self.key) is not None

    def is_dir(self) -> bool:
        """Return whether there is a file below this path."""
        return self.files.has_folder(self.key)

    def stat(self) -> Status:
        """Return the size and identity of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        status = self.files.status(self.key)
        if status is None:
            raise FileNotFoundError(2, "No such file", str(self))
        return status

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the files and folders directly in this one."""
        return self.glob("*")

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files and folders whose names below this one match, part by part."""
        patterns = pattern.split("/")
        matches: dict[str, None] = {}
        for key in self.files.known(self.key):
            parts = PurePosixPath(key).relative_to(self.key).parts[: len(patterns)]
            if len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns)):
                matches["/".join(parts)] = None
        return (self / name for name in matches)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files below this folder whose names match."""
        paths = (RemotePath(self.files, key) for key in self.files.known(self.key))
        return (path for path in paths if fnmatchcase(path.name, pattern))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading; the reader fetches no more than it asks for, by pages."""
        return cast(BinaryIO, _RemoteFile(self, self.stat().st_size))

    def read_bytes(self) -> bytes:
        """Return the content of the file."""
        return self.files.read(self.key, 0, self.stat().st_size)

    def read_into(self, offset: int, out: memoryview, pause: Callable[[float], Any]) -> None:
        """Fill ``out`` with bytes of the file; see :class:`RemoteFiles`."""
        self.files.read_into(self.key, offset, out, pause)

    def stream(
        self, offset: int, length: int, buffer: memoryview, pause: Callable[[float], Any]
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range as they arrive; see :class:`RemoteFiles`."""
        return self.files.stream(self.key, offset, length, buffer, pause)


AnyPath = Path | RemotePath
"""Path of a file or folder, here or somewhere else."""


def glob(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Return the files and folders in a folder whose names match, sorted."""
    return sorted(folder.glob(pattern), key=str)


def files_below(folder: AnyPath) -> dict[str, AnyPath]:
    """Return all files below a folder by their path in it, sorted."""
    paths: list[AnyPath] = [path for path in folder.rglob("*") if path.is_file()]
    start = len(str(folder)) + 1
    return {str(path)[start:]: path for path in sorted(paths, key=str)}


def for_each(
    function: Callable[[_Item], _Result], items: Iterable[_Item], folder: AnyPath
) -> Iterable[_Result]:
    """Return a function's results in order; several calls wait at a time if a folder is remote."""
    if not isinstance(folder, RemotePath):
        return map(function, items)
    with ThreadPoolExecutor(folder.files.connections) as pool:
        return list(pool.map(function, items))


def address_of(path: AnyPath) -> str:
    """Return the text that opens a path again; it may hold credentials."""
    return path.address if isinstance(path, RemotePath) else str(path)


def here(path: AnyPath) -> Path:
    """Return a path of this machine.

    Raises:
        InputError: it is somewhere else.
    """
    if isinstance(path, RemotePath):
        raise InputError(f"{path}: this needs a folder on this machine. Download it first.")
    return path


class _RemoteFile(io.RawIOBase):
    """Open file whose bytes are fetched when they are read."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._path.files.read(
            self._path.key, self._at, left if size < 0 else min(size, left)
        )
        self._at += len(data)
        return data
