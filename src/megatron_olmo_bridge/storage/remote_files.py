"""Files that are somewhere else: pinned, read by ranges, and fetched again after a failure."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import RemoteFiles, Status

CONNECTIONS = 8
"""Default number of requests in flight."""
TRIES = 6
"""Attempts without progress after which a transfer ends."""
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each wait after it is twice as long."""
LONGEST_WAIT = 60.0
"""Seconds that a server may ask to wait."""
PROGRESS = 64 << 10
"""Bytes that count as progress. A server that breaks off after fewer each time is given up."""
PAGE = 8 << 10
"""Bytes that a reader of headers fetches at least: those of an archive fit."""
KEPT_PAGES = 1024
LARGEST_KEPT = 256 << 10
"""Bytes of a range above which it is read at once, and not kept."""
_Result = TypeVar("_Result")


class TryAgainError(Exception):
    """The server did not answer, broke off, or asks to wait."""

    def __init__(self, why: str, after: float | None = None, *, answered: bool = True) -> None:
        super().__init__(why)
        self.after = after
        """Seconds to wait, if the server says so."""
        self.answered = answered
        """Whether there was an answer at all."""


class Body(Protocol):
    """Answer of a server, while it arrives."""

    def readinto(self, out: memoryview, /) -> int:
        """Read some bytes, and return their number; 0 at the end.

        Raises:
            TryAgainError: the connection broke.
        """


class Transport(Protocol):
    """Way to reach the files below an address. Each method tries once."""

    address: str
    url: str
    is_immutable: bool
    """Whether the address names content that never changes, such as a commit."""

    def listing(self) -> dict[str, Status] | None:
        """Return every file by its key; None if the server can't list them."""

    def probe(self, key: str) -> tuple[Status, bytes] | None:
        """Return the status of a file and perhaps its first bytes; None if there is none.

        Raises:
            TryAgainError: no answer, or not yet.
            InputError: the server refuses.
        """

    def candidates(self, folder: str) -> list[str]:
        """Return keys that files in a folder may have, if they can't be listed."""

    def markers(self, folder: str) -> list[str]:
        """Return keys of which a folder that can't be listed has at least one."""

    def nothing_there(self) -> str:
        """Return the message for an address without any file that a checkpoint has."""

    def open(self, key: str, status: Status, begin: int, end: int) -> AbstractContextManager[Body]:
        """Request bytes of a file.

        Raises:
            TryAgainError: no answer, or not yet.
            InputError: the server refuses, or the file is not the one with this status any more.
        """


class PinnedFiles(RemoteFiles):
    """Files below an address. The status of each is taken once."""

    def __init__(self, transport: Transport, connections: int = CONNECTIONS) -> None:
        self._transport = transport
        self.address, self.url = transport.address, transport.url
        self.connections = connections
        self._lock = threading.Lock()
        self._statuses: dict[str, Status | None] = {}
        self._pages: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._used: set[str] = set()
        self._answered = False
        listing = self._until_done(transport.listing, self.url)
        self._answered = listing is not None
        self._is_listed = listing is not None
        self._statuses |= listing or {}

    def status(self, key: str) -> Status | None:
        if key not in self._statuses and not self._is_listed:
            found = self._until_done(lambda: self._transport.probe(key), f"{self.url}/{key}")
            with self._lock:
                self._statuses.setdefault(key, found and found[0])
                if found and found[1]:
                    self._pages[key, 0] = found[1]
        return self._statuses.get(key)

    def known(self, folder: str) -> list[str]:
        if not self._is_listed:
            with ThreadPoolExecutor(self.connections) as pool:
                list(pool.map(self.status, self._transport.candidates(folder)))
        start = f"{folder}/" if folder else ""
        found = self._statuses.copy().items()
        return sorted(key for key, status in found if status and key.startswith(start))

    def has_folder(self, key: str) -> bool:
        start = f"{key}/" if key else ""
        if any(status and k.startswith(start) for k, status in self._statuses.copy().items()):
            return True
        if self._is_listed:
            return False
        with ThreadPoolExecutor(self.connections) as pool:
            return any(pool.map(self.status, self._transport.markers(key)))

    def read(self, key: str, offset: int, length: int) -> bytes:
        status = self._pinned(key)
        if length > LARGEST_KEPT:
            return self._fetch(key, offset, length)
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        with self._lock:
            pages = {page: self._pages.get((key, page)) for page in range(first, end)}
        missing = [page for page, data in pages.items() if data is None]
        if missing:
            begin = missing[0] * PAGE
            data = self._fetch(key, begin, min((missing[-1] + 1) * PAGE, status.st_size) - begin)
            for page in range(missing[0], missing[-1] + 1):
                pages[page] = data[page * PAGE - begin :][:PAGE]
            self._keep(key, pages)
        joined = b"".join(data or b"" for data in pages.values())
        return joined[offset - first * PAGE :][:length]

    def _keep(self, key: str, pages: dict[int, bytes | None]) -> None:
        with self._lock:
            for page, data in pages.items():
                if data is not None:
                    self._pages[key, page] = data
            while len(self._pages) > KEPT_PAGES:
                self._pages.popitem(last=False)

    def _fetch(self, key: str, offset: int, length: int) -> bytes:
        out = bytearray(length)
        self.read_into(key, offset, memoryview(out))
        return bytes(out)

    def read_into(
        self, key: str, offset: int, out: memoryview, pause: Callable[[float], Any] = time.sleep
    ) -> None:
        for _ in self._receive(key, offset, len(out), lambda done: out[done:], pause):
            pass

    def stream(
        self, key: str, offset: int, length: int, buffer: memoryview, pause: Callable[[float], Any]
    ) -> Iterator[memoryview]:
        return self._receive(key, offset, length, lambda done: buffer[: length - done], pause)

    def _receive(
        self,
        key: str,
        offset: int,
        length: int,
        place: Callable[[int], memoryview],
        pause: Callable[[float], Any],
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range as they arrive, each time where ``place(done)`` puts them."""
        status, done, attempts = self._pinned(key), 0, self._attempts(f"{self.url}/{key}", pause)
        while done < length:
            try:
                begin, end = offset + done, offset + length
                with self._transport.open(key, status, begin, end) as body:
                    self._answered = True
                    while done < length:
                        out = place(done)
                        count = body.readinto(out)
                        if not count:
                            raise TryAgainError("the connection ended early")
                        done += count
                        attempts.progressed(count)
                        yield out[:count]
            except TryAgainError as error:
                attempts.failed(error)

    def _pinned(self, key: str) -> Status:
        status = self.status(key)
        if status is None:
            raise InputError(f"{self.url}/{key}: no such file")
        self._used.add(key)
        return status

    def check_unchanged(self) -> None:
        if self._transport.is_immutable:
            return

        def check(key: str) -> None:
            where = f"{self.url}/{key}"
            now = self._until_done(lambda: self._transport.probe(key), where)
            if now is None or now[0] != self._statuses[key]:
                raise InputError(changed(where))

        with ThreadPoolExecutor(self.connections) as pool:
            list(pool.map(check, sorted(self._used)))

    def _until_done(self, action: Callable[[], _Result], where: str) -> _Result:
        attempts = self._attempts(where, time.sleep)
        while True:
            try:
                result = action()
                self._answered = True
                return result
            except TryAgainError as error:
                attempts.failed(error)

    def _attempts(self, where: str, pause: Callable[[float], Any]) -> _Attempts:
        return _Attempts(where, pause, lambda: self._answered)


class _Attempts:
    """Counts the failures since the last progress, and waits between attempts."""

    def __init__(
        self, where: str, pause: Callable[[float], Any], was_reached: Callable[[], bool]
    ) -> None:
        self._where, self._pause, self._was_reached = where, pause, was_reached
        self._failures, self._bytes = 0, 0

    def progressed(self, count: int) -> None:
        """Count bytes that arrived."""
        self._bytes += count
        if self._bytes >= PROGRESS:
            self._failures = 0

    def failed(self, error: TryAgainError) -> None:
        """Wait before the next attempt.

        Raises:
            InputError: there were too many, the server asks to wait too long, or it has never
                answered: a wrong address should not take a minute.
        """
        self._failures, self._bytes = self._failures + 1, 0
        if not (error.answered or self._was_reached()):
            raise InputError(f"{self._where}: can't be reached: {error}") from error
        if error.after is not None and error.after > LONGEST_WAIT:
            raise InputError(
                f"{self._where}: the server asks to wait {error.after:.0f} s ({error}). Try again "
                "then; --resume continues."
            ) from error
        if self._failures == TRIES:
            raise InputError(
                f"{self._where}: given up after {TRIES} attempts without progress: {error}. "
                "Try again later; --resume continues."
            ) from error
        wait = FIRST_WAIT * 2 ** (self._failures - 1) * random.uniform(0.5, 1)
        self._pause(wait if error.after is None else error.after)


def changed(where: str) -> str:
    """Return the message for a file that is another one than at the first look."""
    return (
        f"{where}: changed while the checkpoint was read, so that what was read may be a mixture "
        "of two. Run it again when nothing writes there."
    )
