"""Open a checkpoint by its address: ``https://``, ``hf://``, ``s3://`` or ``gs://``."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import RemotePath

from .http_files import HTTPFiles
from .hub_files import HubFiles
from .object_files import ObjectFiles
from .remote_files import CONNECTIONS, PinnedFiles, Transport

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
SINGLE_FILES = (".pt",)
"""Endings of files that are a checkpoint by themselves."""


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""``owner/name``"""
HUB_ADDRESS = re.compile(rf"hf://(?P<repo>{HUB_ID.pattern})(@(?P<revision>\S+))?")


def scheme_of(source: str) -> str | None:
    """Return the scheme of an address, in lower case; None for a path or a hub id."""
    found = _SCHEME.match(source)
    return found[1].lower() if found else None


def open_remote(address: str, connections: int = CONNECTIONS) -> RemotePath:
    """Return the path of a folder or file at an address.

    Args:
        address: the address, perhaps with a login or a signed query.
        connections: number of requests in flight.

    Raises:
        InputError: the scheme is unknown, or the server can't be reached or refuses.
    """
    address, _, query = address.partition("?")
    folder, name = address.rstrip("/"), ""
    if folder.endswith(SINGLE_FILES):
        folder, _, name = folder.rpartition("/")
    transport = _transport(folder + (f"?{query}" if query else ""))
    files = PinnedFiles(transport, connections)
    if not name and not files.has_folder(""):
        raise InputError(transport.nothing_there())
    return RemotePath(files, str(PurePosixPath(name)) if name else "")


def _transport(address: str) -> Transport:
    scheme = scheme_of(address)
    if scheme in ("http", "https"):
        return HTTPFiles(address)
    if scheme == "hf":
        if (found := HUB_ADDRESS.fullmatch(address)) is None:
            raise InputError(f"{address}: write hf://owner/name or hf://owner/name@revision")
        return HubFiles(found["repo"], found["revision"])
    if scheme in ("s3", "gs"):
        return ObjectFiles(address)
    raise InputError(
        f"{scheme}://: unknown; an address begins with https://, hf://, s3:// or gs://"
    )
