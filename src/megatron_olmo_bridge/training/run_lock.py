"""One run at a time in a folder: a lock that a run's first process holds as long as it lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.runtime.process_groups import on_first

from .config import TrainingConfig

LOCK = "run.lock"
"""Name of the lock in a folder that a run is writing into."""
_RUN, _NAME = 0, 1
"""Bytes of the file that are locked: for the run's life, and while its name is written or read."""
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_ATTEMPTS = 100


@contextlib.contextmanager
def exclusive(config: TrainingConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out of the folders that a run writes into; all processes call it.

    Args:
        config: names the folders: ``checkpoint.save`` and ``export.hf``.
        say: told where the file system has no locks.

    Raises:
        OutputError: another run is at work in one of them, or it can't be written.
    """
    folders = {
        Path(value).expanduser().resolve(): f"{field}={value}"
        for field, value in (
            ("export.hf", config.export.hf),
            ("checkpoint.save", config.checkpoint.save),
        )
        if value is not None
    }
    with contextlib.ExitStack() as locks:

        def lock_all() -> None:
            for folder, named in folders.items():
                locks.enter_context(_locked(folder, named, say))

        on_first(lock_all)
        yield


@contextlib.contextmanager
def _locked(folder: Path, named: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it isn't there.

    It is a POSIX record lock: the system drops it when the process ends, however that is, and it is
    not inherited by the helpers that the process forks. On a shared file system it holds between
    nodes: NFS, Lustre mounted with ``flock``, GPFS, CephFS.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        descriptor = _open_locked(folder, named, say)
    except OSError as error:
        raise OutputError(f"{named}: can't be written: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(descriptor, folder / LOCK):  # the folder may have been moved meanwhile
                (folder / LOCK).unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty: a run has begun there
            for path in made:
                path.rmdir()


def _open_locked(folder: Path, named: str, say: Callable[[str], None]) -> int:
    for attempt in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a run that failed has just removed the folder it had made
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        try:
            _lock(descriptor, named)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            say(f">> {named}: its file system has no locks; see that no other run writes there")
            return descriptor
        except OutputError:
            os.close(descriptor)
            raise
        if _is_at(descriptor, folder / LOCK):
            return descriptor
        os.close(descriptor)  # the run before has just ended and deleted it
    raise OutputError(f"{named}: something deletes {folder / LOCK} again and again")


def _lock(descriptor: int, named: str) -> None:
    """Take the lock and write down who has it; raises OutputError if another has it."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, _NAME)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _RUN)
    except OSError as error:
        if error.errno not in _HELD:
            raise
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
        raise OutputError(
            f"{named}: another run is at work there "
            f"({holder}). Let it end or stop it, or name another folder."
        ) from None
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        holder = f"host {socket.gethostname()}, process {os.getpid()}, since {since}"
        os.pwrite(descriptor, holder.encode(), 0)
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _NAME)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
