"""Files in an object store: ``s3://bucket/prefix`` and ``gs://bucket/prefix``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from megatron_olmo_bridge.errors import InputError, missing_package
from megatron_olmo_bridge.formats.remote_path import Status

from .remote_files import Body, Transport, TryAgainError, changed

CLIENT = {"timeout": "60s", "connect_timeout": "10s", "allow_http": True}
"""HTTP is used only where the environment names such an endpoint."""
CHUNK = 1 << 20
"""Bytes that arrive at a time."""


_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)")
_LATER = ("408", "429")


class ObjectFiles(Transport):
    """Transport by obstore, which finds logins where the vendors' own tools find them."""

    is_immutable = False

    def __init__(self, address: str) -> None:
        """Open a bucket.

        Raises:
            MissingPackageError: obstore is not installed.
            InputError: the address or the environment is wrong.
        """
        try:
            import obstore
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise missing_package("obstore") or error from error
        self.address = self.url = address
        self._obstore: Any = obstore
        # Attempts are counted in one place, for all transports: PinnedFiles.
        options: dict[str, Any] = {"retry_config": {"max_retries": 0}, "client_options": CLIENT}
        try:
            self._store: Any = from_url(address, **options)
        except self._obstore.exceptions.BaseError as error:
            raise InputError(f"{address}: {_reason(error)}") from error

    def listing(self) -> dict[str, Status]:
        with self._translated(self.url, self.nothing_there()):
            pages = self._obstore.list(self._store)
            return {meta["path"]: _status(meta) for page in pages for meta in page}

    def probe(self, key: str) -> tuple[Status, bytes] | None:
        with self._translated(f"{self.url}/{key}"):
            return _status(self._obstore.head(self._store, key)), b""

    def candidates(self, folder: str) -> list[str]:
        return []

    def markers(self, folder: str) -> list[str]:
        return []

    def nothing_there(self) -> str:
        return f"{self.url}: there are no files"

    @contextlib.contextmanager
    def open(self, key: str, status: Status, begin: int, end: int) -> Iterator[Body]:
        where = f"{self.url}/{key}"
        with self._translated(where):
            options = {"range": (begin, end), "if_match": status.tag}
            answer = self._obstore.get(self._store, key, options=options)
            if _status(answer.meta) != status or tuple(answer.range) != (begin, end):
                raise InputError(changed(where))
            yield _Body(answer.stream(min_chunk_size=CHUNK), self._obstore.exceptions.BaseError)

    @contextlib.contextmanager
    def _translated(self, where: str, absent: str = "") -> Iterator[None]:
        """Raise obstore's errors as InputError, or as TryAgainError if they may pass."""
        errors = self._obstore.exceptions
        try:
            yield
        except (errors.NotFoundError, errors.PreconditionError) as error:
            raise InputError(absent or changed(where)) from error
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise InputError(
                f"{where}: the server refuses access. Is a login missing or expired? For a public "
                "bucket set AWS_SKIP_SIGNATURE=true or GOOGLE_SKIP_SIGNATURE=true."
            ) from error
        except errors.BaseError as error:
            status = _STATUS.search(str(error))
            if status and status[1][0] == "4" and status[1][:3] not in _LATER:
                raise InputError(f"{where}: the server answers {status[1]}") from error
            raise TryAgainError(_reason(error), answered=status is not None) from error


class _Body:
    """Body of an answer, whose chunks are cut to fit."""

    def __init__(self, chunks: Any, error_type: type[Exception]) -> None:
        self._chunks, self._error_type = iter(chunks), error_type
        self._left = memoryview(b"")

    def readinto(self, out: memoryview, /) -> int:
        if not self._left:
            try:
                self._left = memoryview(next(self._chunks, b""))
            except self._error_type as error:
                raise TryAgainError(_reason(error)) from error
        count = min(len(out), len(self._left))
        out[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _status(meta: Any) -> Status:
    return Status(meta["size"], meta["e_tag"] or str(meta["last_modified"]))


def _reason(error: Exception) -> str:
    """Return the end of an error's first line, which begins with the address and the duration."""
    status = _STATUS.search(str(error))
    return (
        f"the server answers {status[1]}" if status else str(error).split("\n")[0].split(" - ")[-1]
    )
