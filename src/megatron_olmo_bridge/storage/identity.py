"""Detect that a checkpoint's files changed between opening it and finishing to read it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath, Status


class Identity(NamedTuple):
    """Metadata of a file that changes with its content.

    Only the kernel sets ``ctime_ns``, so it differs even if the other times were set back.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    tag: str = ""
    """What a server says instead, for example an ETag."""

    @classmethod
    def of(cls, file: AnyPath) -> Identity:
        """Return the identity of a file, or of the target of a link."""
        status = file.stat()
        if isinstance(status, Status):
            return cls(status.st_size, 0, 0, 0, status.tag)
        return cls._from(status)

    @classmethod
    def _from(cls, status: os.stat_result) -> Identity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def identity_digest(files: Mapping[AnyPath, Identity]) -> str:
    """Return a SHA-256 digest of the files' paths and identities, in the order given."""
    folders = {folder: folder.resolve() for folder in {file.parent for file in files}}
    described = [(str(folders[f.parent] / f.name), *identity) for f, identity in files.items()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """Identities of the files of a checkpoint before the first of them is read."""

    folders: Mapping[AnyPath, tuple[str, ...]]
    """Each folder, with patterns for the names of checkpoint files in it."""
    files: Mapping[AnyPath, Identity]
    """Every file directly in one of the folders."""

    @classmethod
    def of(cls, folders: Mapping[AnyPath, tuple[str, ...]]) -> Snapshot:
        """Take a snapshot; folders that don't exist count as empty."""
        return cls(folders, {f: i for folder in folders for f, i in _files_in(folder)})

    def check_unchanged(self, used: Collection[AnyPath] = ()) -> None:
        """Raise InputError if a file was changed, replaced, added or removed since.

        Args:
            used: files to check in addition to those whose names match.
        """
        for files in {f.files for f in self.folders if isinstance(f, RemotePath)}:
            files.check_unchanged()
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


def _files_in(folder: AnyPath) -> Iterable[tuple[AnyPath, Identity]]:
    if isinstance(folder, RemotePath) or not folder.is_dir():
        return  # a remote file is pinned when it is first seen
    for file in folder.iterdir():
        try:
            status = file.stat()
        except FileNotFoundError:  # a broken link
            continue
        if stat.S_ISREG(status.st_mode):
            yield file, Identity._from(status)
