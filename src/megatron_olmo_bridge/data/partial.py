"""Prepare a dataset in a folder ``OUT.partial``, until OUT has all its files.

A marker in the folder records what is prepared. A part is complete once its .json exists, which has
checksums of its files. A run that is killed at any moment leaves a folder that ``--resume``
continues, and nothing that could be read as a dataset, which needs ``OUT.idx``. With
``--overwrite``, the old dataset is kept until the new one is written.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, OutputError
from megatron_olmo_bridge.formats.files import read_json
from megatron_olmo_bridge.storage.atomic import PARTIAL, sync
from megatron_olmo_bridge.storage.lock import Lock, take

from .info import read_info
from .parts import write_json

OUTPUTS = (".bin", ".idx", ".json")
JOINED = "joined"
"""Stem of the finished files until they are renamed to OUT."""
_MARKER, _LOCK = "prepare.json", "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Partial:
    """The folder ``OUT.partial`` of one run."""

    def __init__(
        self,
        prefix: str,
        plan: dict[str, Any],
        record: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """Check what exists already; nothing is changed before :meth:`opened`.

        Args:
            prefix: prefix of the output.
            plan: what is prepared; an interrupted run is resumed only if its plan is the same.
            record: record of the run; a finished run with the same ``plan`` and ``input_state`` is
                not done again.
            resume: continue an interrupted run.
            overwrite: replace an existing output, and discard an interrupted run.

        Raises:
            OutputError: something is in the way, or another plan was interrupted.
            FormatError: the marker of an interrupted run is damaged.
        """
        self.prefix = prefix
        self.folder = Path(prefix + PARTIAL)
        self._marker = self.folder / _MARKER
        self._plan, self._replace, self._continue = plan, overwrite, False
        if self.folder.exists() and not overwrite:
            self._look_at_interrupted(resume)
        if self.folder.exists() and not (self._marker.exists() or self._just_made()):
            raise OutputError(
                f"{self.folder}: is in the way, and prepare-data did not make it. Move it."
            )
        self.finished = resume and not overwrite and self._made_before(record)
        """Whether an earlier run has done everything already."""
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
        """Lock the folder; remove it when all is done, or when it holds no finished part.

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
        except InputError:  # resuming would fail again
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
            lock.release()

    def _locked(self) -> Lock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return take(self.folder / _LOCK)
        except OSError as error:
            raise OutputError(f"{error.filename}: can't write here: {error.strerror}") from error

    def _mark(self) -> None:
        write_json(self._marker, {"plan": self._plan, "replace": self._replace})

    def _remove_files(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in (_MARKER, _LOCK):
                path.unlink()

    def _remove(self) -> None:
        self._remove_files()  # the marker last: it identifies what a kill would leave
        shutil.rmtree(self.folder)

    def commit(self) -> None:
        """Rename the finished files to OUT."""
        self._replace = True  # from here on OUT's files may be this run's own
        self._mark()
        for path in reversed(self.outputs):
            path.unlink(missing_ok=True)
        for path in self.outputs:
            (self.folder / f"{JOINED}{path.suffix}").rename(path)
        sync(self.folder.parent)
