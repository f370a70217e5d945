"""The folder that a conversion writes into, and how it becomes the destination.

Everything is written into ``DST.partial``, or into ``DST`` itself if that is an empty folder. A
marker file in it names the plan and journals each finished file; no command reads a folder that
has the marker. When all is written and synced, ``DST.partial`` is renamed to ``DST``, the tracker
is written, and finally the marker is removed. A kill at any moment leaves a folder that is refused
as a checkpoint and that ``--resume`` completes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.formats.files import check_name
from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath
from megatron_olmo_bridge.mapping.registry import bulleted

from .atomic import PARTIAL, name_in_errors, sync, write_synced
from .cloning import Clones
from .identity import Identity
from .lock import Lock, check_free, take
from .plan import CopyPlan, OutputFile
from .provenance import read_provenance

PARTIAL_MARKER = ".olmo-bridge-partial"
"""File in a folder that is not complete. No command reads such a folder."""


class Stage:
    """The output of a conversion while it is written."""

    def __init__(
        self,
        destination: Path,
        plan: CopyPlan,
        *,
        resume: bool,
        overwrite: bool,
        reflink: str = "never",
    ) -> None:
        # Resolved, so that the target of a link is replaced, on its own disk, and "." has a name.
        self.destination = destination = destination.resolve()
        self.finished = False
        """True if an earlier run of the same plan completed: nothing is left to do."""
        self.complete: set[str] = set()
        """Files that are written and synced."""
        self._partial = destination.parent / (destination.name + PARTIAL)
        self._replaced = destination.parent / f"{destination.name}.replaced"
        self._plan, self._resume, self._overwrite = plan, resume and not overwrite, overwrite
        self._header = {"plan": plan.digest, "source": plan.source_digest}
        self._reflink = reflink
        self.clones = Clones()
        """What is cloned instead of copied."""
        self._recording = threading.Lock()
        self._lock: Lock | None = None
        """Lock of the marker, while this process writes here."""
        self._journal = b""
        """Content of the marker when it was read, which is before it is locked."""
        self.folder = self._where_to_write()
        """``DST.partial``; or ``DST``, if that is an empty folder."""
        self._check()

    def _where_to_write(self) -> Path:
        # An empty folder is used as it is: it may be a working directory or a mount point, have
        # special permissions, or be in a folder where no other can be created.
        begun_before = self._resume and _started(self._partial) and not _started(self.destination)
        in_place = self.destination.is_dir() and is_vacant(self.destination)
        return self.destination if in_place and not begun_before else self._partial

    def _check(self) -> None:
        """Raise OutputError if the output can't be written, before anything is written."""
        check_name(self.destination)
        if self._plan.source is not None:
            refuse_overlap(self._plan.source, self.destination)
        for folder in (self.destination, self._partial):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder}: is a file; it is not overwritten")
            if folder.exists() and not _empty(folder):
                self._check_occupied(folder)
        if self._resume and _started(self.folder):
            self._read_journal()
        begun = _started(self.destination) or _started(self._partial)
        if self._replaced.exists() and not begun:
            raise OutputError(
                f"{self._replaced}: exists already, and --overwrite needs this name to keep "
                "the old output until the new one is complete. Move it away."
            )
        if self.folder != self.destination and self.destination.is_mount():
            raise OutputError(f"{self.destination}: is a mount point; name a folder in it")
        if not self.finished:
            self._check_disk()
            self._check_size_limit()

    def _check_size_limit(self) -> None:
        name, size = max(self._plan.sizes.items(), key=lambda item: item[1])
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY and size > limit:
            raise OutputError(
                f"{self.destination}: {name} will have {size:,} bytes, but this process may write "
                f"files of {limit:,} at most. Raise the limit (ulimit -f)."
            )

    def _check_occupied(self, folder: Path) -> None:
        if _started(folder):
            check_free(folder / PARTIAL_MARKER)
            if not (self._resume or self._overwrite):
                raise OutputError(
                    f"{folder}: left by an interrupted {self._plan.operation}. Pass --resume "
                    "to continue it, or --overwrite to discard it."
                )
        elif folder == self._partial:
            raise OutputError(f"{folder}: exists, but no conversion made it. Move it away.")
        elif not self._overwrite:
            if not (self._resume and self._made_by_this_plan()):
                differs = " It is not what --resume would complete." if self._resume else ""
                raise OutputError(
                    f"{folder}: exists already. Pass --overwrite to replace it.{differs}"
                )
            self.finished = not _started(self._partial)

    def _check_disk(self) -> None:
        parents = () if self.folder == self.destination else self.destination.parents
        existing = next(p for p in (*parents, self.destination) if p.exists())
        if not existing.is_dir():
            raise OutputError(f"{self.destination}: {existing} is a file; name another folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(f"{existing}: no permission to write here")
        self.clones = Clones.of(self._plan, existing, self._reflink)
        done = sum(f.size for f in self._plan.files if f.name in self.complete)
        shared = self.clones.nbytes(f for f in self._plan.files if f.name not in self.complete)
        need = self._plan.output_bytes - done - shared
        free = shutil.disk_usage(existing).free + self._reclaimed()
        if need > free:
            raise OutputError(
                f"{existing}: the disk is too small: {need:,} bytes needed, {free:,} free"
            )

    def _made_by_this_plan(self) -> bool:
        """Return whether the destination is what this run would write."""
        recorded = read_provenance(self.destination / self._plan.weights_folder) or {}
        made_of = (recorded.get("plan_sha256"), recorded.get("source_digest"))
        same = made_of == (self._plan.digest, self._plan.source_digest)
        return same and not self._lacking(self.destination)

    def _lacking(self, folder: Path) -> list[str]:
        """Return which planned files are absent or have another size, one sentence each."""
        lacking = []
        for name, size in self._plan.sizes.items():
            file = folder / name
            if not file.is_file():
                lacking.append(f"{name} is absent")
            elif (found := file.stat().st_size) != size:
                lacking.append(f"{name} has {found} bytes, not {size}")
        return lacking

    def check_output(self, folder: Path | None = None) -> None:
        """Raise OutputError unless every planned file is at the destination, or in ``folder``."""
        folder = folder or self.destination
        if lacking := self._lacking(folder):
            raise OutputError(
                f"{folder}: something else changed what was written here:\n{bulleted(lacking)}\n"
                f"Run the {self._plan.operation} again with --overwrite."
            )

    def _reclaimed(self) -> int:
        """Return the bytes on disk of files that will be written again."""
        kept = {self.folder / name for name in self.complete}
        files = (f for f in self.folder.rglob("*") if f not in kept and f.is_file())
        return sum(f.stat().st_blocks * 512 for f in files)

    def _read_journal(self) -> None:
        """Read the journal of an interrupted run of the same plan."""
        try:
            self._journal = (self.folder / PARTIAL_MARKER).read_bytes()
            lines = self._journal.decode().splitlines()
            header = json.loads(lines[0])
        except (OSError, ValueError, IndexError):
            if list(self.folder.iterdir()) == [self.folder / PARTIAL_MARKER]:
                return  # killed before the header was written
            header, lines = {}, []
        if header != self._header:
            began = "from other source files, or these have changed since"
            if header.get("plan") != self._header["plan"]:
                began = "with other options, another model or another version of olmo-bridge"
            raise OutputError(
                f"{self.folder}: can't be resumed: it was begun {began}. Use the same again, or "
                "pass --overwrite to discard it and start afresh."
            )
        sizes = {f.name: f.size for f in self._plan.files}
        for line in lines[1:]:
            try:
                name, *then = json.loads(line)
                now = Identity.of(self.folder / name)
            except (ValueError, TypeError, OSError):  # an incomplete line, or a deleted file
                continue
            if now == Identity(*then) and now.size == sizes.get(name):
                self.complete.add(name)

    def open(self) -> None:
        """Create and lock the folder, or continue one, and allocate every file."""
        if self.finished:
            return
        try:
            if self.folder == self.destination and self._partial.exists():
                _remove_abandoned(self._partial)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
            for file in self._plan.files:
                if file.name not in self.complete:
                    with name_in_errors(self.folder / file.name):
                        self._allocate(file)
        except PermissionError as error:
            raise OutputError(f"{error.filename}: no permission to write here") from error

    def _take(self) -> None:
        """Lock the folder, and empty it unless an interrupted run is continued."""
        begun = _started(self.folder)
        lock = take(self.folder / PARTIAL_MARKER, is_journal=True)
        if not begun and len(list(self.folder.iterdir())) > 1:
            lock.release(delete=True)
            raise OutputError(f"{self.folder}: exists already. Pass --overwrite to replace it.")
        if self.complete and os.pread(lock.descriptor, len(self._journal) + 1, 0) != self._journal:
            lock.release()
            raise OutputError(f"{self.folder}: another olmo-bridge was writing here just now")
        self._lock = lock  # from here on, discard() may delete the content
        if not self.complete:
            clear(self.folder)
            os.truncate(lock.descriptor, 0)
            os.write(lock.descriptor, json.dumps(self._header).encode() + b"\n")
            os.fsync(lock.descriptor)
            sync(self.folder)

    def _allocate(self, file: OutputFile) -> None:
        """Create a file of its final size, with room for all that is not cloned."""
        path = self.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            handle.truncate(file.size)
            if hasattr(os, "posix_fallocate"):
                for offset, count in self.clones.copied_ranges(file):
                    os.posix_fallocate(handle.fileno(), offset, count)

    def record(self, name: str) -> None:
        """Journal a file that is written and synced, with its identity."""
        assert self._lock is not None
        line = json.dumps([name, *Identity.of(self.folder / name)]).encode() + b"\n"
        with self._recording:
            self.complete.add(name)
            os.write(self._lock.descriptor, line)

    def write_text(self, name: str, data: bytes) -> None:
        """Write and sync a small file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, data)

    def commit(self) -> None:
        """Rename the folder to the destination and make it a checkpoint, after all is written."""
        self.check_output(self.folder)
        for folder in sorted({p.parent for p in self.folder.rglob("*")}, reverse=True):
            sync(folder)
        if self.folder != self.destination:
            if self.destination.exists() and not _empty(self.destination):
                self.destination.rename(self._replaced)
            self.folder.rename(self.destination)  # which may replace an empty folder
            sync(self.destination.parent)
        self._finish()

    def _finish(self) -> None:
        if self._plan.tracker:
            name, data = self._plan.tracker
            write_synced(self.destination / name, data)
        if self._replaced.exists():
            (self._replaced / PARTIAL_MARKER).touch()
            _remove(self._replaced)
        (self.destination / PARTIAL_MARKER).unlink()
        sync(self.destination)
        self.close()

    def discard(self) -> None:
        """Delete what this process has written; a folder that existed before stays."""
        if self._lock is not None:
            if self.folder == self.destination:
                clear(self.folder)
                (self.folder / PARTIAL_MARKER).unlink()
            else:
                _remove(self.folder)
            self.close()

    def close(self) -> None:
        """Unlock the folder and keep what is written."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def refuse_overlap(source: AnyPath, destination: Path) -> None:
    """Raise OutputError if one of the two folders is the other, or contains it."""
    if isinstance(source, RemotePath):
        return
    dst, src = destination.resolve(), source.resolve()
    if dst == src or dst in src.parents or src in dst.parents:
        raise OutputError(
            f"{destination}: the output may not be the source, in it, or around it ({source})"
        )


def _started(folder: Path) -> bool:
    """Return whether a folder has the marker of a run that is interrupted or in progress."""
    return (folder / PARTIAL_MARKER).exists()


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def is_vacant(folder: Path) -> bool:
    """Return whether a folder is absent, empty, or left by an interrupted run."""
    return not folder.exists() or (folder.is_dir() and (_empty(folder) or _started(folder)))


def _remove(folder: Path) -> None:
    """Delete a folder, its marker last, so that a kill leaves nothing like a checkpoint."""
    clear(folder)
    shutil.rmtree(folder)


def _remove_abandoned(folder: Path) -> None:
    """Delete what an interrupted run left, unless another run continues it."""
    with ExitStack() as stack:
        if _started(folder):
            stack.callback(take(folder / PARTIAL_MARKER, is_journal=True).release)
        _remove(folder)


def clear(folder: Path) -> None:
    """Delete the content of a folder except its marker."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != PARTIAL_MARKER:
            path.unlink()
