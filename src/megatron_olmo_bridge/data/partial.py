"""The folder that a dataset is prepared in: ``OUT.partial``, until OUT has all its files.

A marker in it says what is prepared; a part is finished when its .json is there, which has
checksums of its files. Killed at any moment, a run leaves a folder that ``--resume`` continues, and
no ``OUT.idx``, without which there is no dataset; with ``--overwrite`` the one that is replaced
stays until the new one is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, OutputError
from megatron_olmo_bridge.formats.files import read_json
from megatron_olmo_bridge.storage.atomic import PARTIAL, sync

from .info import read_info
from .parts import write_json

OUTPUTS = (".bin", ".idx", ".json")
JOINED = "joined"
"""Stem of the finished files, before they are given their names."""
_MARKER, _LOCK = "prepare.json", "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Partial:
    """Where parts are written, by one run at a time."""

    def __init__(
        self,
        prefix: str,
        plan: dict[str, Any],
        record: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """Raise OutputError if something is in the way; nothing is changed before :meth:`opened`.

        Args:
            prefix: of the output.
            plan: what is prepared; an interrupted run must have had the same.
            record: has what the record of a finished run must have, ``plan`` and ``input_state``.
        """
        self.prefix = prefix
        self.folder = Path(prefix + PARTIAL)
        self._marker = self.folder / _MARKER
        self._plan, self._replace, self._continue = plan, overwrite, False
        if self.folder.exists() and not overwrite:
            self._look_at_interrupted(resume)
        if self.folder.exists() and not (self._marker.exists() or self._just_made()):
            raise OutputError(f"{self.folder}: is in the way, and not of prepare-data. Move it.")
        self.finished = resume and not overwrite and self._made_before(record)
        """Whether a run before has done all: then there is nothing to do."""
        for path in self.outputs:
            if path.exists() and not (self._replace or self.finished):
                raise OutputError(f"{path}: exists already. Pass --overwrite to replace it.")

    @property
    def outputs(self) -> list[Path]:
        return [Path(self.prefix + suffix) for suffix in OUTPUTS]

    def _just_made(self) -> bool:
        return all(path.name.startswith((_MARKER, _LOCK)) for path in self.folder.iterdir())

    def _made_before(self, record: dict[str, Any]) -> bool:
        try:
            made = read_info(self.prefix)
        except BridgeError:
            return False
        return (made.plan, made.input_state) == (record["plan"], record["input_state"])

    def _look_at_interrupted(self, resume: bool) -> None:
        try:
            begun = read_json(self._marker)
        except FileNotFoundError:
            return
        plan, replaces = begun.get("plan"), begun.get("replace")
        if not isinstance(plan, dict) or not isinstance(replaces, bool):
            raise FormatError(f"{self._marker}: is damaged. Pass --overwrite to start afresh.")
        if not resume:
            raise OutputError(
                f"{self.folder}: left by an interrupted prepare-data. Pass --resume to continue "
                "it, or --overwrite to discard it."
            )
        for what, value in self._plan.items():
            if plan.get(what) != value:
                raise OutputError(
                    f"{self.folder}: was begun with another {what.replace('_', ' ')}, so it can't "
                    "be resumed. Pass --overwrite to discard it and start afresh."
                )
        self._replace, self._continue = replaces, True

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Have the folder, alone. Done, or of no use, it is removed; else finished parts stay.

        Raises:
            OutputError: no permission, a full disk, or another run is writing there.
        """
        lock = self._locked()
        try:
            if not (self._continue or self.finished):
                self._remove_files()
                self._mark()
            yield
            self._remove()
        except InputError:  # would come again
            self._remove()
            raise
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OutputError(
                f"{self.folder}: can't write more: {error.strerror}. Make room and pass --resume: "
                "finished parts are kept."
            ) from error
        finally:
            if self.folder.exists() and not any(self.folder.glob("part-*.json")):
                self._remove()
            os.close(lock)

    def _locked(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A file, open for writing: NFS has no exclusive lock of a folder.
            lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{error.filename}: can't write here: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OutputError(f"{self.folder}: another prepare-data is writing here") from None
        except OSError:
            pass  # a file system without locks
        return lock

    def _mark(self) -> None:
        write_json(self._marker, {"plan": self._plan, "replace": self._replace})

    def _remove_files(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in (_MARKER, _LOCK):
                path.unlink()

    def _remove(self) -> None:
        self._remove_files()  # the marker last: what a kill leaves is still known for what it is
        shutil.rmtree(self.folder)

    def commit(self) -> None:
        """Give the finished files their names."""
        self._replace = True  # from here on OUT's files may be this run's own
        self._mark()
        for path in reversed(self.outputs):
            path.unlink(missing_ok=True)
        for path in self.outputs:
            (self.folder / f"{JOINED}{path.suffix}").rename(path)
        sync(self.folder.parent)
