"""Run each case in its own process and report its result, message, time and memory.

    isolated.py subject|reference

reads a line of JSON (``{"target": ..., "folder": ...}``) for each case and answers with one. Each
case is a fork of this process, in which everything is imported already; so what a case takes is
what it takes beyond that, and nothing of a case is left for the next.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDRESS_SPACE = 2 << 30
"""Additional bytes that a case can map before it is stopped, far above the memory limit."""
HANG = 60.0
"""Seconds after which a case is killed. The time limit counts processor time, which other work on
the machine doesn't increase; this one is for cases that wait."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a case."""

    ended: str
    """accepted, refused, memory (out of memory), traceback, died or hung."""
    value: Any = None
    """Values read from an accepted case, as JSON."""
    message: str = ""
    """Error message of a case that was not accepted."""
    seconds: float = 0.0
    """Processor time in seconds."""
    nbytes: int = 0
    """Peak memory in bytes above that at the start."""


class Worker:
    """Process that forks once per case."""

    def __init__(self, side: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
        )

    def run(self, target: str, folder: Path) -> Outcome:
        """Run a case."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"target": target, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _memory() -> tuple[int, int]:
    """Return the mapped and the resident bytes of this process."""
    mapped, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(mapped) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _forked(function: Any, folder: Path) -> Outcome:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os._exit(_case(function, folder, write))
    os.close(write)
    answer = bytearray()
    ended = ""
    while True:
        if not select.select([read], [], [], HANG)[0]:
            ended = "hung"
            os.kill(pid, signal.SIGKILL)
            break
        block = os.read(read, 1 << 20)
        if not block:
            break
        answer += block
    os.close(read)
    _, status, usage = os.wait4(pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if ended or status:
        why = ended or f"exit status {os.waitstatus_to_exitcode(status)}"
        return Outcome(ended or "died", message=why, seconds=seconds)
    said = json.loads(answer)
    # The fork has less than its parent at first: no pages of files.
    nbytes = max(0, (usage.ru_maxrss << 10) - said.pop("resident"))
    return Outcome(**said, seconds=seconds, nbytes=nbytes)


def _case(function: Any, folder: Path, write: int) -> int:
    """Run a case in this process, which was forked for it; return the exit code."""
    from megatron_olmo_bridge.errors import BridgeError

    mapped, resident = _memory()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = {"ended": "accepted", "value": function(folder)}
    except BridgeError as error:
        answer = {"ended": "refused", "message": str(error)}
        cause: BaseException | None = error
        while cause is not None:  # memory that was asked for and not there is used all the same
            if isinstance(cause, MemoryError):
                answer["ended"] = "memory"
            cause = cause.__cause__ or cause.__context__
    except BaseException:
        answer = {"ended": "traceback", "message": traceback.format_exc()[-3000:]}
    with os.fdopen(write, "wb") as out:
        out.write(json.dumps(answer | {"resident": resident}).encode())
    return 0


def main() -> None:
    """Answer cases until standard input ends."""
    import targets

    functions = targets.functions(sys.argv[1])
    for line in sys.stdin:
        case = json.loads(line)
        outcome = _forked(functions[case["target"]], Path(case["folder"]))
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
