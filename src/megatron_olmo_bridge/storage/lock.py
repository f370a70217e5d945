"""Locks that a process holds as long as it lives, so that no two write into the same folder.

A lock is a POSIX record lock on a file. The system drops it when the process ends, however that
happens, and forked helpers don't inherit it. On a shared file system it holds between nodes: NFS,
Lustre mounted with ``flock``, GPFS, CephFS. The system also drops it when the process closes any
descriptor of the file, so nothing else in the process may open the file while it is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_olmo_bridge.errors import OutputError

_LOCK, _HOLDER = 0, 1
"""Offsets of the two bytes that are locked: the first while the lock is held, the second while the
name of the holder is written or read."""
_REFUSED = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_MUTEX = threading.Lock()
_HELD: dict[tuple[int, int], int] = {}
"""Descriptor of each file that this process has locked, by device and inode. The system would let
the process lock it again."""
os.register_at_fork(after_in_child=_HELD.clear)


class HeldError(OutputError):
    """Another run, in this process or another one, has the lock."""

    def __init__(self, path: Path, descriptor: int) -> None:
        text = os.pread(descriptor, 200, 0).decode(errors="replace")
        self.holder = f" ({text})" if text.startswith("host ") else ""
        super().__init__(
            f"{path.parent}: another olmo-bridge is writing here right now{self.holder}"
        )


class ReleasedError(OutputError):
    """Another run deleted the file after it was opened here, and before it was locked."""


@dataclass(frozen=True)
class Lock:
    """A file that this process has locked."""

    path: Path
    descriptor: int
    """Open for reading and appending."""
    is_effective: bool
    """False where the file system has no locks: other processes are not kept out."""

    def release(self, *, delete: bool = False) -> None:
        """Release the lock; with ``delete``, delete the file first if it still has its name."""
        with _MUTEX:
            if delete and _is_at(self.descriptor, self.path):
                with contextlib.suppress(OSError):
                    self.path.unlink()
            del _HELD[_key(os.fstat(self.descriptor))]
            os.close(self.descriptor)


def take(path: Path, *, is_journal: bool = False) -> Lock:
    """Lock a file, which is created if it does not exist.

    Args:
        path: the file; its folder exists.
        is_journal: leave the content alone. Otherwise it is replaced with host, process and time,
            for the message that another run gets.

    Raises:
        HeldError: another run has the lock.
        ReleasedError: another run has just deleted the file.
        OSError: the file can't be opened or locked.
    """
    with _MUTEX:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        try:
            is_effective = _lock(descriptor, path, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):
                raise ReleasedError(f"{path.parent}: another olmo-bridge was writing here just now")
            if not is_journal:
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                holder = f"host {socket.gethostname()}, process {os.getpid()}, since {since}"
                with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, holder.encode())
            if is_effective:
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _HOLDER)
        except BaseException:
            os.close(descriptor)
            raise
        _HELD[_key(os.fstat(descriptor))] = descriptor
    return Lock(path, descriptor, is_effective)


def check_free(path: Path) -> None:
    """Raise HeldError if a run has locked an existing file. Several processes may ask at once."""
    with _MUTEX:
        descriptor = _open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _lock(descriptor, path, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    """Open a file, unless this process has locked it: closing it again would drop the lock."""
    with contextlib.suppress(FileNotFoundError):
        if (descriptor := _HELD.get(_key(path.stat()))) is not None:
            raise HeldError(path, descriptor)
    return os.open(path, flags, 0o666)


def _lock(descriptor: int, path: Path, kind: int) -> bool:
    """Lock both bytes of an open file; return False if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, kind, 1, _HOLDER)
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, 1, _LOCK)
    except OSError as error:
        if error.errno in _REFUSED:
            raise HeldError(path, descriptor) from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path names an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
