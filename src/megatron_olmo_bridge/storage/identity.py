"""Detect that a checkpoint's files changed between opening it and finishing to read it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from megatron_olmo_bridge.errors import InputError


class Identity(NamedTuple):
    """Metadata of a file that changes with its content.

    Only the kernel sets ``ctime_ns``, so it differs even if the other times were set back.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> Identity:
        """Return the identity of a file, or of the target of a link."""
        return cls._from(file.stat())

    @classmethod
    def _from(cls, status: os.stat_result) -> Identity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def identity_digest(files: Mapping[Path, Identity]) -> str:
    """Return a SHA-256 digest of the files' paths and identities, in the order given."""
    folders = {folder: folder.resolve() for folder in {file.parent for file in files}}
    described = [(str(folders[f.parent] / f.name), *identity) for f, identity in files.items()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """Identities of the files of a checkpoint before the first of them is read."""

    folders: Mapping[Path, tuple[str, ...]]
    """Each folder, with patterns for the names of checkpoint files in it."""
    files: Mapping[Path, Identity]
    """Every file directly in one of the folders."""

    @classmethod
    def of(cls, folders: Mapping[Path, tuple[str, ...]]) -> Snapshot:
        """Take a snapshot; folders that don't exist count as empty."""
        return cls(folders, {f: i for folder in folders for f, i in _files_in(folder)})

    def check_unchanged(self, used: Collection[Path] = ()) -> None:
        """Raise InputError if a file was changed, replaced, added or removed since.

        Args:
            used: files to check in addition to those whose names match.
        """
        now = Snapshot.of(self.folders).files
        for file in dict.fromkeys((*self.files, *now)):
            if now.get(file) == self.files.get(file):
                continue
            patterns = self.folders[file.parent]
            if file in used or any(fnmatchcase(file.name, pattern) for pattern in patterns):
                changed = "changed" if file in now else "vanished"
                what = changed if file in self.files else "appeared"
                raise InputError(
                    f"{file}: {what} while the checkpoint was read, so that what was read may be "
                    "a mixture of two. Run it again when nothing writes there."
                )


def _files_in(folder: Path) -> Iterable[tuple[Path, Identity]]:
    for file in folder.iterdir() if folder.is_dir() else ():
        try:
            status = file.stat()
        except FileNotFoundError:  # a broken link
            continue
        if stat.S_ISREG(status.st_mode):
            yield file, Identity._from(status)
