"""Checksums of a run's checkpoint: recorded while it is saved, compared before it is loaded.

The record is ``olmo_bridge.json``, as other commands write it: ``verify`` reads it too.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.runtime.process_groups import gather, on_first
from megatron_olmo_bridge.storage.execute import sha256
from megatron_olmo_bridge.storage.plan import WORKERS
from megatron_olmo_bridge.storage.provenance import (
    LIVE,
    PROVENANCE,
    TRAIN,
    read_provenance,
    sealed,
    versions,
)
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER

_OF_RANK = ".sha256-"
"""Prefix of the file in which one process records the checksums of its own files."""
_SHOWN = 8
"""Maximum number of damaged files in a message."""
Entries = dict[str, dict[str, Any]]
"""Size and SHA-256 of each file, by its name in the checkpoint."""


def recording(request: AsyncRequest, folder: Path) -> AsyncRequest:
    """Make the process that writes a rank's files also record their checksums.

    Args:
        request: request of ``dist_checkpointing.save``.
        folder: folder of the checkpoint.
    """
    if request.async_fn is None:
        return request  # nothing to write on this rank
    write = functools.partial(_write_and_record, request.async_fn, folder, dist.get_rank())
    return request._replace(async_fn=write)


def _write_and_record(
    write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any
) -> None:
    write(*args, **kwargs)
    with contextlib.suppress(OSError):  # the first process computes what is missing
        entries = _entries(folder, folder.glob(f"__{rank}_*"))
        (folder / f"{_OF_RANK}{rank}").write_text(json.dumps(entries))


def _entries(folder: Path, files: Iterable[Path]) -> Entries:
    files = sorted(files)
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = pool.map(sha256, files)
        return {
            file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
            for file, digest in zip(files, digests, strict=True)
        }


def write_record(folder: Path) -> None:
    """Record every file of a finished checkpoint; the first process calls it."""
    entries: Entries = {}
    for part in folder.glob(f"{_OF_RANK}*"):
        with contextlib.suppress(ValueError):
            entries |= json.loads(part.read_text())
        part.unlink()
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (PARTIAL_MARKER, PROVENANCE)
    }
    known = {
        name: entry
        for name, entry in entries.items()
        if name in files and entry["bytes"] == files[name].stat().st_size
    }
    entries = known | _entries(folder, (path for name, path in files.items() if name not in known))
    record = {
        "operation": TRAIN,
        "source": LIVE,
        "versions": versions(),
        "files": dict(sorted(entries.items())),
    }
    (folder / PROVENANCE).write_bytes(sealed(record))


def check(folder: Path) -> None:
    """Compare a checkpoint with its checksums, if any were recorded; all processes call it.

    Each file is read once, by one of the processes.

    Raises:
        FormatError: files are not as they were written; the message names them.
    """
    entries = gather(on_first(lambda: recorded(folder)))[0] or {}
    names = sorted(entries)[dist.get_rank() :: dist.get_world_size()]
    with ThreadPoolExecutor(WORKERS) as pool:
        damages = list(pool.map(lambda name: _damage(folder / name, entries[name]), names))
    damaged = [
        f"{name} {damage}"
        for part in gather(list(zip(names, damages, strict=True)))
        for name, damage in part
        if damage
    ]
    if damaged:
        shown = [f"  {line}" for line in sorted(damaged)[:_SHOWN]]
        more = [f"  and {len(damaged) - _SHOWN} more"] * (len(damaged) > _SHOWN)
        lines = "\n".join(shown + more)
        raise FormatError(f"{folder}: damaged since it was written:\n{lines}")


def recorded(folder: Path) -> Entries | None:
    """Return the recorded files with their checksums; None if there are none.

    Raises:
        FormatError: the record is damaged.
    """
    record = read_provenance(folder)
    if record is None:
        return None
    files: Entries = record["files"]
    return files if files and all("sha256" in entry for entry in files.values()) else None


def _damage(file: Path, entry: dict[str, Any]) -> str | None:
    """Describe what is wrong with a file; None if nothing is."""
    try:
        if not file.is_file():
            return "is not there"
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, not those that were written"
        return None if sha256(file) == entry["sha256"] else "has other bytes than were written"
    except OSError as error:
        return f"can't be read: {error.strerror}"
