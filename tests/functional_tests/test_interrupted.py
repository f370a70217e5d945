"""compare, roundtrip and generate end with one sentence when interrupted, and leave no process.

Their worker processes are stopped (SIGSTOP) before the signal, so that it arrives in time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("megatron.core")

from killing import wait_until

from megatron_olmo_bridge import synth

INTERRUPTED = "olmo-bridge: interrupted.\n"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("olmo2-tiny", tmp_path_factory.mktemp("hf") / "tiny")


class Running:
    """Command in a separate session with a terminal as standard error, so that it shows its
    steps."""

    def __init__(self, temporary: Path, *arguments: object) -> None:
        ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_olmo_bridge", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        os.close(theirs)
        self._terminal = os.fdopen(ours, newline="\n")
        self.shown: list[str] = []

    def lines(self) -> Iterator[str]:
        """Yield the lines that it prints."""
        try:
            for line in self._terminal:
                self.shown.append(line.replace("\r\n", "\n"))
                yield self.shown[-1]
        except OSError:  # Linux signals the end of a terminal this way
            return

    def wait_for(self, step: str) -> list[int]:
        """Wait until it prints a step, then stop its worker processes; return their ids."""
        assert any(line.startswith(f"... {step}") for line in self.lines()), self.shown
        command = self.process.pid
        workers = [pid for pid in in_session(command) if stat_of(pid).parent == command]
        os.killpg(workers[0], signal.SIGSTOP)
        return workers

    def ended(self) -> int:
        """Wait until it and all its processes are gone; return its exit code."""
        for _ in self.lines():
            pass
        code = self.process.wait()
        wait_until(lambda: not in_session(self.process.pid))
        return code


class Stat(NamedTuple):
    """Fields of /proc/PID/stat."""

    state: str
    parent: int
    session: int


def stat_of(pid: int) -> Stat:
    state, parent, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    return Stat(state, int(parent), int(session))


def in_session(session: int) -> list[int]:
    """Return the living processes of a session, including children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # the process has just exited
            stat = stat_of(int(folder.name))
            if stat.session == session and stat.state != "Z":
                found.append(int(folder.name))
    return found


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # see test_kill_and_resume.py
    yield lambda *arguments: Running(tmp_path, *arguments)
    signal.signal(signal.SIGINT, before)
    assert list(tmp_path.glob("olmo-bridge-*")) == [], "temporary files are left"


def test_ctrl_c_ends_compare_and_its_processes(start: Start, hf: Path) -> None:
    run = start("compare", hf, hf, "--tp", 2)
    assert len(run.wait_for("load")) == 2

    os.killpg(run.process.pid, signal.SIGINT)  # like a terminal

    assert run.ended() == 130
    assert run.shown[-1] == INTERRUPTED
    assert "Traceback" not in "".join(run.shown)


@pytest.mark.slow
def test_ctrl_c_ends_generate_and_its_processes(start: Start, hf: Path) -> None:
    run = start("generate", hf, "--tokens", "1,2,3", "--max-new-tokens", 4000)
    assert len(run.wait_for("generate")) == 1

    os.killpg(run.process.pid, signal.SIGINT)

    assert run.ended() == 130
    assert run.shown[-1] == INTERRUPTED
    assert "Traceback" not in "".join(run.shown)


@pytest.mark.slow
def test_sigterm_ends_roundtrip_and_its_processes(start: Start, hf: Path) -> None:
    """It also removes its two copies of the model."""
    run = start("roundtrip", hf, "--tp", 2)
    run.wait_for("save with stock megatron-core")

    run.process.terminate()

    assert run.ended() == 128 + signal.SIGTERM
    assert [line for line in run.shown if not line.startswith("... ")] == []


@pytest.mark.slow
def test_a_process_of_roundtrip_that_dies_is_reported(start: Start, hf: Path) -> None:
    run = start("roundtrip", hf, "--tp", 2)
    workers = run.wait_for("save with stock megatron-core")

    os.kill(workers[1], signal.SIGKILL)

    assert run.ended() == 2
    message = next(line for line in run.shown if not line.startswith("... "))
    assert message.startswith("olmo-bridge: a process was killed by SIGKILL, as the system does ")
    assert "Traceback" not in "".join(run.shown)
