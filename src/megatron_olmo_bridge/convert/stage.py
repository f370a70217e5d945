"""The folder that a conversion writes into until it is complete, and how it takes its name.

Everything goes into ``DST.partial``. A marker file in it names the plan and journals each finished
file; nothing in this package reads a folder that has the marker. When all is written and synced the
folder is renamed to ``DST``, the tracker is written, and last the marker is removed. Killed at any
moment, it leaves a folder that is refused as a checkpoint and that ``--resume`` completes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.formats.detect import PARTIAL_MARKER

from .plan import CopyPlan, fingerprint
from .provenance import read_provenance


class Stage:
    """A conversion's output while it is written."""

    def __init__(self, destination: Path, plan: CopyPlan, *, resume: bool, overwrite: bool) -> None:
        # Resolved, so that what a link points at is replaced, on its own disk; "." has a name then.
        self.destination = destination = destination.resolve()
        self.folder = destination.parent / f"{destination.name}.partial"
        self.complete: set[str] = set()
        """Files that are written and synced."""
        self._replaced = destination.parent / f"{destination.name}.replaced"
        self._plan, self._resume, self._overwrite = plan, resume, overwrite
        self._header = {"plan": plan.digest, "source": fingerprint(plan.source_files)}
        self._lock = threading.Lock()
        self._marker: int | None = None
        self._check()

    def _check(self) -> None:
        """Raise OutputError, before anything is written, if the output can't be written."""
        if self._plan.source is not None:
            refuse_overlap(self._plan.source, self.destination)
        left_by_kill = _started(self.destination)
        for folder in (self.destination, self.folder):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder}: is a file; it is not overwritten")
            if not folder.exists() or _empty(folder):
                continue
            if _started(folder):
                with _locked(folder, fcntl.LOCK_SH):
                    pass  # nobody is writing here right now
                if self._resume and not self._overwrite:
                    self._complete_before(folder)
                elif not self._overwrite:
                    raise OutputError(
                        f"{folder}: left by an interrupted {self._plan.operation}. Pass --resume "
                        "to continue it, or --overwrite to discard it."
                    )
            elif folder == self.folder:
                raise OutputError(f"{folder}: is in the way, and no conversion's. Move it away.")
            elif not self._overwrite and not (self._resume and self._made_by_this_plan()):
                raise OutputError(f"{folder}: exists already. Pass --overwrite to replace it.")
        if self._replaced.exists() and not left_by_kill and not _started(self.folder):
            raise OutputError(
                f"{self._replaced}: is in the way; --overwrite keeps here what it replaces until "
                "it is done. Move it away."
            )
        if self.destination.is_mount():
            raise OutputError(f"{self.destination}: is a mount point; name a folder in it")
        parent = self.destination.parent
        existing = next(p for p in (parent, *parent.parents, Path()) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(f"{existing}: no permission to write here")
        done = sum(f.size for f in self._plan.files if f.name in self.complete)
        need = self._plan.output_bytes - done
        free = shutil.disk_usage(existing).free + self._reclaimed()
        if need > free and not (self._resume and left_by_kill):
            raise OutputError(
                f"{existing}: the disk is too small: {need:,} bytes needed, {free:,} free"
            )

    def _made_by_this_plan(self) -> bool:
        """Whether the destination is what this run would write: then there is nothing to do."""
        recorded = read_provenance(self.destination / self._plan.weights_folder) or {}
        sizes = {f.name: f.size for f in self._plan.files}
        return recorded.get("plan_sha256") == self._plan.digest and all(
            (file := self.destination / name).is_file() and file.stat().st_size == size
            for name, size in sizes.items()
        )

    def _reclaimed(self) -> int:
        """Bytes that an interrupted run holds in files which are written anew."""
        kept = {self.folder / name for name in self.complete}
        files = (f for f in self.folder.rglob("*") if f not in kept and f.is_file())
        return sum(f.stat().st_blocks * 512 for f in files)

    def _complete_before(self, folder: Path) -> None:
        """Read the journal of an interrupted run of the same plan."""
        try:
            lines = (folder / PARTIAL_MARKER).read_text().splitlines()
            header = json.loads(lines[0])
        except (OSError, ValueError, IndexError):
            return  # killed before the plan was on disk: nothing to continue from
        if header != self._header:
            what = "plan" if header.get("plan") != self._header["plan"] else "source files"
            raise OutputError(
                f"{folder}: was begun with another {what}, so it can't be resumed. Pass "
                "--overwrite to discard it and start afresh."
            )
        sizes = {f.name: f.size for f in self._plan.files}
        for name in lines[1:]:
            file = folder / name
            if name in sizes and file.is_file() and file.stat().st_size == sizes[name]:
                self.complete.add(name)

    def open(self) -> None:
        """Take the output: make the folder, or continue one, and allocate every file."""
        try:
            if (self.finished and not self._overwrite) or self._finish_after_rename():
                return
            if not self.complete and self.folder.exists():
                with _locked(self.folder):
                    _remove(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            marker = os.open(
                self.folder / PARTIAL_MARKER, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666
            )
            _take_lock(marker, self.folder)
            self._marker = marker  # now it is known to be ours
            if not self.complete:
                os.truncate(self._marker, 0)
                os.write(self._marker, json.dumps(self._header).encode() + b"\n")
                os.fsync(self._marker)
                sync(self.folder)
            for file in self._plan.files:
                if file.name not in self.complete:
                    self._allocate(self.folder / file.name, file.size)
        except PermissionError as error:
            raise OutputError(f"{error.filename}: no permission to write here") from error

    def _allocate(self, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(fd, 0, size)
            else:
                os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def record(self, name: str) -> None:
        """Journal a file that is written and synced."""
        assert self._marker is not None
        with self._lock:
            self.complete.add(name)
            os.write(self._marker, name.encode() + b"\n")

    def write_text(self, name: str, data: bytes) -> None:
        """Write a small file, synced."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(path, data)

    def commit(self) -> None:
        """All is written: give the folder its name, make it a checkpoint."""
        for folder in sorted({p.parent for p in self.folder.rglob("*")}, reverse=True):
            sync(folder)
        if self.destination.exists():
            if _empty(self.destination) or _started(self.destination):
                with _locked(self.destination):
                    _remove(self.destination)
            else:
                self.destination.rename(self._replaced)
        self.folder.rename(self.destination)
        sync(self.destination.parent)
        self._finish()

    def _finish_after_rename(self) -> bool:
        """Whether all that is left to do is what follows the rename; if so it is done."""
        if self._overwrite or not _started(self.destination):
            return False
        with _locked(self.destination):
            if self.folder.exists():  # begun afterwards, to replace it
                _remove(self.folder)
            self._finish()
        return True

    def _finish(self) -> None:
        if self._plan.tracker:
            name, data = self._plan.tracker
            _write_synced(self.destination / name, data)
        if self._replaced.exists():
            (self._replaced / PARTIAL_MARKER).touch()
            _remove(self._replaced)
        (self.destination / PARTIAL_MARKER).unlink()
        sync(self.destination)
        self.close()

    @property
    def finished(self) -> bool:
        done = self.destination.exists() and not _started(self.destination)
        return done and not self.folder.exists()

    def discard(self) -> None:
        """Remove what was written, if this process writes here."""
        if self._marker is not None:
            _remove(self.folder)
            self.close()

    def close(self) -> None:
        """Let go of the folder; what is written stays."""
        if self._marker is not None:
            os.close(self._marker)
            self._marker = None


@contextlib.contextmanager
def _locked(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Keeps other runs out of a folder with a marker."""
    if not _started(folder):
        yield
        return
    fd = os.open(folder / PARTIAL_MARKER, os.O_RDWR)
    try:
        _take_lock(fd, folder, kind)
        yield
    finally:
        os.close(fd)


def _take_lock(fd: int, folder: Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{folder}: another olmo-bridge is writing here right now") from None
    except OSError:
        return  # a file system without locks


def refuse_overlap(source: Path, destination: Path) -> None:
    """Raise OutputError if one of the two is the other, or is in it."""
    dst, src = destination.resolve(), source.resolve()
    if dst == src or dst in src.parents or src in dst.parents:
        raise OutputError(
            f"{destination}: the output may not be the source, in it, or around it ({source})"
        )


def _started(folder: Path) -> bool:
    """Whether an interrupted run, or one still at work, left its marker there."""
    return (folder / PARTIAL_MARKER).exists()


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _remove(folder: Path) -> None:
    """Delete a folder, its marker last: what a kill leaves of it is refused as a checkpoint."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != PARTIAL_MARKER:
            path.unlink()
    shutil.rmtree(folder)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
