"""Processes that are started: what they print comes back, and so does what went wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import MappingError, ProcessError
from megatron_olmo_bridge.runtime.devices import NO_TF32
from megatron_olmo_bridge.runtime.launch import processes, reporting_errors

MODULE = """
import os, sys
from megatron_olmo_bridge.errors import MappingError
from megatron_olmo_bridge.runtime.launch import reporting_errors
rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
def say(line):  # in one piece: the others print too, and print() may write the end by itself
    os.write(1, (line + "\\n").encode())
if sys.argv[1] == "tf32":
    say(f"NVIDIA_TF32_OVERRIDE={os.environ['NVIDIA_TF32_OVERRIDE']}")
    sys.exit()
say(f"{sys.argv[1]} {rank} of {world}, {os.environ['OMP_NUM_THREADS']} threads")
with reporting_errors():
    if sys.argv[1] == "refuse":
        raise MappingError(f"two lines:\\nsaid {world} times")
    if sys.argv[1] == "crash":
        raise ZeroDivisionError("of its own")
    if sys.argv[1] == "stay":
        import signal, subprocess
        stay = "import signal; signal.pause()"
        helper = subprocess.Popen([sys.executable, "-c", stay], stdin=subprocess.DEVNULL)
        say(f"pids {os.getpid()} {helper.pid}")
        signal.pause()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "started_module.py").write_text(MODULE)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("RANK", "7")  # of whoever started us: not theirs
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def start(what: str, count: int) -> list[str]:
    with processes("started_module", [what], count) as output:
        return sorted(output)


def test_one_process_uses_all_cores() -> None:
    assert start("work", 1) == [f"work 0 of 1, {os.cpu_count()} threads\n"]


def test_several_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # it is the user's word
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert start("work", 2) == [f"work {rank} of 2, {threads} threads\n" for rank in (0, 1)]


def test_variables_for_the_processes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example the variable that disables TF32."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with processes("started_module", ["tf32"], 1, environment=NO_TF32) as output:
        assert list(output) == ["NVIDIA_TF32_OVERRIDE=0\n"]
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_this_package_comes_back_as_itself(count: int) -> None:
    with pytest.raises(MappingError, match=f"two lines:\nsaid {count} times"):
        start("refuse", count)


def test_another_error_comes_back_with_its_last_lines() -> None:
    with pytest.raises(ProcessError, match=r"exit code 1(.|\n)*ZeroDivisionError: of its own"):
        start("crash", 1)


def pids(line: str) -> list[int]:
    return [int(pid) for pid in line.split()[1:]] if line.startswith("pids") else []


def wait_until_gone(pid: int) -> None:
    """Nobody may be there to collect a helper's exit code: then it stays as a zombie."""
    with contextlib.suppress(FileNotFoundError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            os.sched_yield()


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_the_caller_ends_the_processes_and_their_helpers(count: int) -> None:
    started: list[int] = []
    with pytest.raises(KeyboardInterrupt), processes("started_module", ["stay"], count) as output:
        for line in output:
            started += pids(line)
            if len(started) == 2 * count:
                raise KeyboardInterrupt
    for pid in started:
        wait_until_gone(pid)


def test_ctrl_c_while_a_line_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the reading, and nobody is left to be told that there is no more to read."""
    failures: list[object] = []
    before = threading.enumerate()
    monkeypatch.setattr(threading, "excepthook", failures.append)
    with pytest.raises(KeyboardInterrupt), processes("started_module", ["stay"], 1) as output:
        next(output)
        output.close()  # what an exception inside of it does
        raise KeyboardInterrupt
    for thread in threading.enumerate():
        if thread not in before:
            thread.join()
    assert failures == []


def test_when_one_is_killed_the_others_and_all_helpers_end() -> None:
    started: list[int] = []
    with (
        pytest.raises(ProcessError, match="a process was killed by SIGKILL, as the system does"),
        processes("started_module", ["stay"], 2) as output,
    ):
        for line in output:
            started += pids(line)
            if len(started) == 4:
                os.kill(started[0], signal.SIGKILL)
    assert len(started) == 4
    for pid in started:
        wait_until_gone(pid)


def test_processes_end_with_the_one_that_started_them() -> None:
    """However that ends: SIGKILL leaves it no time to end them."""
    code = """
from megatron_olmo_bridge.runtime.launch import processes
with processes("started_module", ["stay"], 2) as output:
    for line in output:
        print(line, end="", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        started: list[int] = []
        while len(started) < 4:
            started += pids(parent.stdout.readline())
        parent.kill()
    for pid in started:
        wait_until_gone(pid)


def test_without_somebody_who_started_it_an_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OLMO_BRIDGE_ERROR_FILE", raising=False)
    with pytest.raises(MappingError, match="nobody listens"), reporting_errors():
        raise MappingError("nobody listens")
