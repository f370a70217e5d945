"""Kill a conversion, check that its leftovers are refused, resume it, and compare the output.

Shared by the tests on a small model and by ``kill_full_size.py``."""

import filecmp
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_olmo_bridge import export_checkpoint, inspect, verify
from megatron_olmo_bridge.errors import BridgeError

KILLABLE = Path(__file__).with_name("killable.py")
KILLED = -9
MARKER = ".olmo-bridge-partial"


def start(
    arguments: Sequence[object], point: str | None = None, file_bytes: int = 0
) -> subprocess.Popen[str]:
    """Start ``olmo-bridge`` in a separate process; with a point, through ``killable.py``."""
    command = [sys.executable, "-m", "megatron_olmo_bridge"]
    if point or file_bytes:
        command = [sys.executable, str(KILLABLE), point or "none", str(file_bytes)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; return its exit code and everything it printed."""
    out, err = process.communicate(timeout=900)
    return process.returncode, out + err


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true; the limit of an hour allows for a busy machine."""
    end = time.monotonic() + 3600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Send SIGKILL after some seconds; return whether the process was still running."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return finish(process)[0] == KILLED


def left_by(destination: Path) -> list[Path]:
    """Return every path at which a run's leftovers could be mistaken for a checkpoint."""
    partial = destination.with_name(destination.name + ".partial")
    return [path for root in (destination, partial) for path in (root, root / "iter_0000000")]


def finished(destination: Path) -> bool:
    """Return whether the run had completed its output before it was killed."""
    return destination.exists() and not (destination / MARKER).exists()


def accepted(destination: Path, source: Path) -> list[str]:
    """Return the commands that accept a killed run's leftovers as a checkpoint; expected: none."""
    elsewhere = destination.with_name("exported-from-what-is-left")
    wrong = []
    for path in left_by(destination):
        for name, command in (
            ("verify", lambda p=path: verify(p, source)),
            ("verify recorded", lambda p=path: verify(p)),
            ("inspect", lambda p=path: inspect(p)),
            ("export", lambda p=path: export_checkpoint(p, elsewhere)),
        ):
            try:
                command()
            except BridgeError:
                continue
            wrong.append(f"{name} {path}")
    shutil.rmtree(elsewhere, ignore_errors=True)
    return wrong


def same(a: Path, b: Path) -> bool:
    """Return whether two trees have the same files with the same bytes."""
    names = [{p.relative_to(root) for p in root.rglob("*") if p.is_file()} for root in (a, b)]
    return names[0] == names[1] and all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in names[0]
    )


def measured(arguments: Sequence[object]) -> float:
    """Return the seconds that an uninterrupted run takes."""
    begin = time.monotonic()
    code, said = finish(start(arguments))
    if code:
        raise RuntimeError(said)
    return time.monotonic() - begin
