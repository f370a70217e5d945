"""Files on a web server, read by range requests over connections that stay open."""

from __future__ import annotations

import base64
import contextlib
import re
import ssl
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.dcp_metadata import METADATA
from megatron_olmo_bridge.formats.hf_folder import ARTIFACT_FILES, CONFIG, INDEX, SINGLE
from megatron_olmo_bridge.formats.iterations import TRACKER
from megatron_olmo_bridge.formats.remote_path import Status
from megatron_olmo_bridge.formats.torch_dist import COMMON, FORMAT_FILE

from .provenance import PROVENANCE
from .remote_files import PAGE, Body, Transport, TryAgainError, changed

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
MAX_REDIRECTS = 5
MARKERS = (CONFIG, METADATA, FORMAT_FILE, TRACKER, "config.yaml")
"""Names of which each folder of a checkpoint has at least one."""
NAMES = (
    *MARKERS,
    *(name for name in ARTIFACT_FILES if "*" not in name and name != CONFIG),
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "spiece.model", "sentencepiece.bpe.model",
    INDEX, SINGLE, COMMON, PROVENANCE, "run_config.yaml", "model.pt", "adapter_config.json",
    "rank0.pt",
)  # fmt: skip
"""Names that are looked for in a folder, since a web server doesn't list it. The index and
``.metadata`` name the rest."""
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_REDIRECTS = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed."""
_ABSENT = (404, 410)
_REFUSED = (401, 403)


class HTTPFiles(Transport):
    """Transport for files below an ``http://`` or ``https://`` address."""

    is_immutable = False

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.address = address
        self.url = without_secrets(address)
        self._base = parts._replace(path=parts.path.rstrip("/"))
        self._connections = _Connections()
        self._redirected: dict[str, str] = {}
        """Where the server sent the first request for a file; it is asked once, not each time."""
        self._missing: dict[str, set[int]] = defaultdict(set)
        """Status codes for what is not in a folder."""

    def listing(self) -> dict[str, Status] | None:
        return None

    def candidates(self, folder: str) -> list[str]:
        return _in(folder, NAMES)

    def markers(self, folder: str) -> list[str]:
        return _in(folder, MARKERS)

    def probe(self, key: str) -> tuple[Status, bytes] | None:
        """Request the first page: it says the size, the identity, and whether there are ranges."""
        where = f"{self.url}/{key}"
        with self._request(key, {"Range": f"bytes=0-{PAGE - 1}"}) as response:
            if response.status in (*_ABSENT, *_REFUSED):
                self._check_absent(key, response.status)
                return None
            if response.status == 416:
                return Status(0, _tag(response, where)), b""
            size = _size(response, where)
            return Status(size, _tag(response, where)), response.read(min(size, PAGE))

    def _check_absent(self, key: str, status: int) -> None:
        """Raise InputError if a file may be there, but may not be read.

        Object stores say 403 for what is absent where listing is not allowed. If they say 404 for
        others, a 403 means what it says.
        """
        folder = key.rpartition("/")[0]
        seen = self._missing[folder]
        seen.add(status)
        if 401 in seen or (seen & {*_ABSENT} and seen & {*_REFUSED}):
            raise InputError(refused(f"{self.url}/{folder}".rstrip("/"), max(seen & {*_REFUSED})))

    def nothing_there(self) -> str:
        if refusals := self._missing[""] & {*_REFUSED}:
            return refused(self.url, max(refusals))
        return (
            f"{self.url}: there is no checkpoint (none of {', '.join(MARKERS)}; status 404). A web "
            "server doesn't list folders: name the checkpoint's own folder."
        )

    @contextlib.contextmanager
    def open(self, key: str, status: Status, begin: int, end: int) -> Iterator[Body]:
        where = f"{self.url}/{key}"
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        if status.tag.startswith('"'):  # a weak ETag never matches
            headers["If-Match"] = status.tag
        with self._request(key, headers) as response:
            if response.status in (*_ABSENT, 412, 416):
                raise InputError(changed(where))
            if response.status in _REFUSED:
                raise InputError(refused(where, response.status))
            now = Status(_size(response, where), _tag(response, where))
            if not self._is_same(key, status, now):
                raise InputError(changed(where))
            found = _RANGE.fullmatch(response.getheader("Content-Range", ""))
            if (found and found[1] != str(begin)) or (not found and begin):
                raise InputError(f"{where}: the server sends another range than it is asked for")
            yield _Body(response)

    def _is_same(self, key: str, status: Status, now: Status) -> bool:
        """Return whether an answer is of the file that was first seen."""
        return now == status

    @contextlib.contextmanager
    def _request(self, key: str, headers: Mapping[str, str]) -> Iterator[HTTPResponse]:
        """Send a GET request and follow redirects; keep the connection if the body was read.

        Raises:
            TryAgainError: no answer, an incomplete one, or a status that may be another later.
            InputError: a redirect to what is not a web server, or an unexpected status.
        """
        where = f"{self.url}/{key}"
        first = self._url_of(key)
        url, answered = self._redirected.get(key, first), False
        try:
            for _ in range(MAX_REDIRECTS):
                sent = {**self._headers(url, first), **headers}
                connection, response = self._connections.get(url, sent)
                answered, location = True, response.getheader("Location")
                if response.status in _REFUSED and self._redirected.pop(key, None) == url:
                    location = first  # a signed address has expired
                elif response.status not in _REDIRECTS or location is None:
                    break
                connection.close()
                url = _redirect(url, location, where)
            else:
                raise InputError(f"{where}: redirected more than {MAX_REDIRECTS} times")
            try:
                if url != first and response.status in (200, 206):
                    self._redirected[key] = url
                _check_status(response, where)
                yield response
            finally:
                self._connections.put(url, connection, response)
        except (OSError, HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise TryAgainError(why, answered=answered) from error

    def _url_of(self, key: str) -> str:
        path = quote(unquote(self._base.path), safe="/~@:+,=") + "/" + quote(key)
        host = self._base.netloc.rpartition("@")[2]
        return urlunsplit(self._base._replace(netloc=host, path=path, fragment=""))

    def _headers(self, url: str, first: str) -> dict[str, str]:
        """Return the headers of every request; a login only for the host that it was given for."""
        headers = {"Accept-Encoding": "identity", "User-Agent": f"olmo-bridge/{__version__}"}
        if _origin(urlsplit(url)) == _origin(urlsplit(first)):
            headers |= self._login()
        return headers

    def _login(self) -> dict[str, str]:
        login, at, _ = self._base.netloc.rpartition("@")
        if not at:
            return {}
        return {"Authorization": _basic(login)}


class _Body:
    """Body of a response."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response

    def readinto(self, out: memoryview, /) -> int:
        try:
            return self._response.readinto(out)
        except (OSError, HTTPException) as error:
            raise TryAgainError(str(error) or type(error).__name__) from error


class _Connections:
    """Open connections that no request is using, by the server's address."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[HTTPConnection]] = defaultdict(list)

    def get(self, url: str, headers: Mapping[str, str]) -> tuple[HTTPConnection, HTTPResponse]:
        """Send a request; a server may have closed an idle connection, so a new one follows."""
        parts = urlsplit(url)
        target, for_proxy = _request_line(parts)
        idle = self._idle[_origin(parts)]
        while True:
            try:
                connection, is_new = idle.pop(), False
            except IndexError:
                connection, is_new = _connect(parts), True
            try:
                connection.request("GET", target, headers={**headers, **for_proxy})
                return connection, connection.getresponse()
            except (OSError, HTTPException):
                connection.close()
                if is_new:
                    raise

    def put(self, url: str, connection: HTTPConnection, response: HTTPResponse) -> None:
        """Keep the connection if the whole body was read, else close it."""
        if response.isclosed() or response.length == 0:
            response.close()
            self._idle[_origin(urlsplit(url))].append(connection)
        else:
            connection.close()


def _proxy(parts: SplitResult) -> SplitResult | None:
    """Return the proxy that the environment names for a server."""
    named = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    return urlsplit(named if "://" in named else f"http://{named}") if named else None


def _connect(parts: SplitResult) -> HTTPConnection:
    """Return a connection to a server, perhaps through a proxy."""
    via = _proxy(parts)
    host, port = (parts.hostname or "", parts.port)
    at, at_port = (via.hostname or "", via.port or 80) if via else (host, port)
    if parts.scheme == "http":
        return HTTPConnection(at, at_port, timeout=TIMEOUT)
    context = ssl.create_default_context()
    connection = HTTPSConnection(at, at_port, timeout=TIMEOUT, context=context)
    if via:
        connection.set_tunnel(host, port, _proxy_login(via))
    return connection


def _request_line(parts: SplitResult) -> tuple[str, dict[str, str]]:
    """Return the target of a request, and headers for a proxy that reads them."""
    if parts.scheme == "http" and (via := _proxy(parts)):
        return urlunsplit(parts), _proxy_login(via)
    return urlunsplit(("", "", parts.path or "/", parts.query, "")), {}


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    return {"Proxy-Authorization": _basic(f"{proxy.username}:{proxy.password or ''}")}


def _basic(login: str) -> str:
    """Return the header of a login, which is quoted as in an address."""
    return f"Basic {base64.b64encode(unquote(login).encode()).decode()}"


def _redirect(url: str, location: str, where: str) -> str:
    """Return the address that a redirect leads to.

    Raises:
        InputError: it is not on a web server, or leaves an encrypted connection.
    """
    target = urljoin(url, location)
    schemes = urlsplit(url).scheme, urlsplit(target).scheme
    if schemes[1] not in ("http", "https") or schemes == ("https", "http"):
        raise InputError(f"{where}: the server redirects to {schemes[1]}, which is not followed")
    return target


def _check_status(response: HTTPResponse, where: str) -> None:
    status = response.status
    if status in _LATER:
        raise TryAgainError(f"the server answers {status}", _seconds(response))
    if status not in (200, 206, 412, 416, *_ABSENT, *_REFUSED):
        raise InputError(f"{where}: the server answers {status} {response.reason}")


def _size(response: HTTPResponse, where: str) -> int:
    """Return the size of the whole file.

    Raises:
        InputError: the server does not serve ranges, or compresses.
    """
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise InputError(f"{where}: the server compresses it, so that ranges have no meaning")
    found = _RANGE.fullmatch(response.getheader("Content-Range", ""))
    if response.status == 206 and found:
        return int(found[3])
    length = response.getheader("Content-Length", "")
    if response.status == 200 and length.isdecimal() and int(length) <= PAGE:
        return int(length)  # a small file may come whole
    raise InputError(
        f"{where}: the server does not serve ranges of files. Download the folder, and name that."
    )


def _tag(response: HTTPResponse, where: str) -> str:
    """Return what changes with the content of the file: its ETag, or when it was modified."""
    tag = response.getheader("ETag") or response.getheader("Last-Modified")
    if tag is None and response.status != 416:
        raise InputError(
            f"{where}: the server gives neither an ETag nor a time of modification, so a change "
            "would not be noticed. Download the folder, and name that."
        )
    return tag or ""


def _seconds(response: HTTPResponse) -> float | None:
    """Return the seconds of ``Retry-After``, which may be a date."""
    text = response.getheader("Retry-After", "")
    if text.isdecimal():
        return float(text)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def refused(where: str, status: int) -> str:
    """Return the message for a server that wants a login, or another one."""
    return f"{where}: the server refuses access ({status}). Is a login missing or expired?"


def _origin(parts: SplitResult) -> tuple[str, str]:
    return parts.scheme, parts.netloc


def _in(folder: str, names: tuple[str, ...]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for name in names]


def without_secrets(address: str) -> str:
    """Return an address without login and query, which may hold a password or a signature."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
