"""One run at a time in a folder, whatever became of the one before."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.training import run_lock
from megatron_olmo_bridge.training.run_lock import LOCK

NAMED = "checkpoint.save=run"


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    return run_lock._locked(folder, NAMED, say=pytest.fail)


@contextlib.contextmanager
def held_elsewhere(folder: Path, then: Callable[[], object] = signal.pause) -> Iterator[int]:
    """Another process that has taken the lock, and does something then; it is killed at last."""
    taken, tell = os.pipe()
    process = os.fork()
    if not process:
        try:
            with locked(folder):
                os.write(tell, b".")
                then()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(taken, 1) == b"."
        yield process
    finally:
        os.close(taken)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_another_run_is_refused_by_host_and_process(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as process:
        with pytest.raises(OutputError) as refused, locked(tmp_path):
            pass
        said = str(refused.value)
        assert said.startswith(f"{NAMED}: another run is at work there (host ")
        assert f"host {socket.gethostname()}, process {process}, since 20" in said
        assert "\n" not in said
        assert (tmp_path / LOCK).exists()


def test_a_killed_run_keeps_nobody_out(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path):
        pass
    assert "process" in (tmp_path / LOCK).read_text()  # nobody tidied up
    with locked(tmp_path):
        assert f"process {os.getpid()}," in (tmp_path / LOCK).read_text()


def test_a_helper_that_outlives_its_run_keeps_nobody_out(tmp_path: Path) -> None:
    """The writer of a checkpoint, for example: a fork with all files of its parent."""
    read, write = os.pipe()

    def fork_a_helper() -> None:
        helper = os.fork()
        if not helper:
            signal.pause()
        os.write(write, f"{helper}\n".encode())
        signal.pause()

    with held_elsewhere(tmp_path, fork_a_helper):
        helper = int(os.read(read, 20))
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(helper, signal.SIGKILL)


def test_nothing_is_left_of_a_run_that_did_not_begin(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_what_a_run_wrote_is_left(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "run.yaml").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.yaml"]


def test_the_lock_of_another_run_is_left(tmp_path: Path) -> None:
    """The run's folder was moved, and another run's folder took its name."""
    folder = tmp_path / "run"
    with contextlib.ExitStack() as later:
        with locked(folder):
            folder.rename(tmp_path / "moved")
            later.enter_context(held_elsewhere(folder))
        assert (folder / LOCK).exists()


def test_of_many_starts_at_once_one_runs(tmp_path: Path) -> None:
    """Each of the others names it: the name is never that of an earlier run, nor half written."""
    with held_elsewhere(tmp_path):
        pass  # killed: its name is left
    go, all_go = os.pipe()
    told, tell = os.pipe()
    end, all_end = os.pipe()
    starts = [start_when_told(tmp_path, go, tell, end, (all_go, all_end)) for _ in range(8)]
    os.close(tell)
    os.close(all_go)
    with os.fdopen(told) as lines:
        said = [lines.readline().strip() for _ in starts]
        os.close(all_end)
    for process in starts:
        os.waitpid(process, 0)

    (winner,) = [line for line in said if line.isdigit()]
    assert int(winner) in starts
    others = [line for line in said if line != winner]
    assert all(f"process {winner}," in line for line in others)
    assert len(others) == 7


def start_when_told(folder: Path, go: int, tell: int, end: int, closed: tuple[int, ...]) -> int:
    process = os.fork()
    if process:
        return process
    for descriptor in closed:
        os.close(descriptor)
    os.read(go, 1)
    try:
        with locked(folder):
            os.write(tell, f"{os.getpid()}\n".encode())
            os.read(end, 1)
    except OutputError as error:
        os.write(tell, f"{error}\n".encode())
    finally:
        os._exit(0)


@pytest.mark.parametrize("place", ["/proc/none", "file", "file/below"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"{NAMED}: can't be written: "), locked(tmp_path / place):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre, for example, mounted without ``flock``: the error is the system's own."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    said: list[str] = []
    with run_lock._locked(tmp_path / "run", NAMED, said.append):
        assert said == [
            f">> {NAMED}: its file system has no locks; see that no other run writes there"
        ]
