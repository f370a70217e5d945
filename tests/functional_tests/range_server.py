"""A web server on loopback that serves ranges of files, and fails when it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from launching import served

LARGE = 16 << 10
"""Bytes of a range above which it is of weights, and may fail."""


@dataclass
class Site:
    """A folder that is served, and what was asked of the server."""

    root: Path
    faults: list[str] = field(default_factory=list)
    """What happens to the next large ranges, from the end of the list: ``drop``, ``429``, ``503``,
    ``short``, ``slow`` or nothing."""
    forbidden: int | None = None
    """Status for everything."""
    has_ranges: bool = True
    redirect: str | None = None
    """Where everything is instead; ``{path}`` stands for the file's path."""
    login: str | None = None
    """Header that every request must have; ``none`` if it must not have one."""
    before_large: Callable[[int], None] = lambda _: None
    """Called with the number of large ranges so far."""
    url: str = ""
    sent: int = 0
    """Bytes of bodies."""
    large: int = 0
    asked: list[str] = field(default_factory=list)
    open_now: int = 0
    most_open: int = 0
    """Large ranges that were answered at the same time."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count a large range while it is answered."""
        with self.lock:
            self.large += 1
            number = self.large
            self.open_now += 1
            self.most_open = max(self.most_open, self.open_now)
        try:
            self.before_large(number)
            yield
        finally:
            with self.lock:
                self.open_now -= 1


class Handler(BaseHTTPRequestHandler):
    """GET with and without ranges."""

    site: Site
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may close a connection at any time
            super().handle()

    def do_GET(self) -> None:
        site, path = self.site, urlsplit(self.path).path
        site.asked.append(self.path)
        if site.login and self.headers.get("Authorization", "none") != site.login:
            return self.answer(401)
        if site.redirect is not None:
            return self.answer(302, Location=site.redirect.format(path=path))
        if site.forbidden:
            return self.answer(site.forbidden)
        file = site.root / path.strip("/")
        if not file.is_file():
            return self.answer(404)
        status = file.stat()
        self.tag = f'"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"'
        if self.headers.get("If-Match", self.tag) != self.tag:
            return self.answer(412)
        size, begin, end = status.st_size, 0, status.st_size
        if site.has_ranges:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            assert found, "everything is asked for by ranges"
            begin, end = int(found[1]), min(size, int(found[2]) + 1)
        with file.open("rb") as opened:
            opened.seek(begin)
            data = opened.read(end - begin)
        if len(data) <= LARGE:
            return self.send(data, "", begin, size)
        with site.counting():
            fault = site.faults.pop() if site.faults else ""
            if fault.isdecimal():
                return self.answer(int(fault), **{"Retry-After": "0"})
            return self.send(data, fault, begin, size)

    def send(self, data: bytes, fault: str, begin: int, size: int) -> None:
        """Send a range, or as much of it as the fault lets through."""
        site, part = self.site, data
        if fault in ("drop", "short"):
            part = data[: len(data) // 2]
        length = len(part) if fault == "short" else len(data)
        self.send_response(206 if site.has_ranges else 200)
        self.send_header("Content-Length", str(length))
        if site.has_ranges:
            self.send_header("Content-Range", f"bytes {begin}-{begin + length - 1}/{size}")
        self.send_header("ETag", self.tag)
        self.end_headers()
        step = len(part) // 4 + 1 if fault == "slow" else max(1, len(part))
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(part), step):
                self.wfile.write(part[at : at + step])
                self.wfile.flush()
                site.sent += len(part[at : at + step])
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Site]:
    """Serve a folder; yield what may be told to the server."""
    site = Site(root)
    with served(type("SiteHandler", (Handler,), {"site": site})) as site.url:
        yield site
