"""A lock keeps others out while its holder lives, in other processes and in the same one.

``test_run_lock.py`` has many starts at once, killed holders, and helpers that outlive them.
"""

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.storage import lock
from megatron_olmo_bridge.storage.lock import HeldError, ReleasedError, check_free, take


def refused_elsewhere(path: Path) -> bool:
    """Return whether another process is refused."""
    process = os.fork()
    if not process:
        try:
            take(path)
        except HeldError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1


@contextmanager
def held_elsewhere(path: Path) -> Iterator[int]:
    """Hold the lock in another process, which is killed in the end."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        take(path, is_journal=True)
        os.write(write, b".")
        signal.pause()
    os.read(read, 1)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_second_taker_in_the_same_process_is_refused(tmp_path: Path) -> None:
    held = take(tmp_path / "lock")
    with pytest.raises(HeldError, match="another olmo-bridge is writing here right now") as refused:
        take(tmp_path / "lock")
    assert f"host {socket.gethostname()}, process {os.getpid()}" in refused.value.holder
    with pytest.raises(HeldError):
        check_free(tmp_path / "lock")
    assert refused_elsewhere(tmp_path / "lock"), "being asked in this process dropped the lock"
    held.release()
    take(tmp_path / "lock").release()


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock"):
        with pytest.raises(HeldError):
            take(tmp_path / "lock")
        with pytest.raises(HeldError):
            check_free(tmp_path / "lock")
    check_free(tmp_path / "lock")
    take(tmp_path / "lock").release()


def test_a_link_to_the_file_is_the_same_lock(tmp_path: Path) -> None:
    held = take(tmp_path / "lock")
    os.link(tmp_path / "lock", tmp_path / "link")
    with pytest.raises(HeldError):
        take(tmp_path / "link")
    held.release()


def test_a_journal_is_locked_without_changing_it(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("line\n")
    held = take(tmp_path / "journal", is_journal=True)
    os.write(held.descriptor, b"next\n")
    held.release()
    assert (tmp_path / "journal").read_text() == "line\nnext\n"


def test_release_deletes_only_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    take(path).release(delete=True)
    assert not path.exists()
    held = take(path)
    path.rename(tmp_path / "moved")
    path.write_text("another run's")
    held.release(delete=True)
    assert path.read_text() == "another run's"


def test_a_file_that_its_holder_has_just_deleted_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock_after_deletion(descriptor: int, path: Path, kind: int) -> bool:
        path.unlink()
        return True

    monkeypatch.setattr(lock, "_lock", lock_after_deletion)
    with pytest.raises(ReleasedError, match="another olmo-bridge was writing here just now"):
        take(tmp_path / "lock")


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    held = take(tmp_path / "lock")
    assert not held.is_effective
    held.release()


def test_a_lock_stays_held_when_its_folder_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    held = take(tmp_path / "out.partial/lock")
    (tmp_path / "out.partial").rename(tmp_path / "out")
    assert refused_elsewhere(tmp_path / "out/lock")
    held.release()


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        take(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()
