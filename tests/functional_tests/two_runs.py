"""Two runs that start at the same moment: ``two_runs.py LOGS FATE RECIPE KEY=VALUE...``

Each writes what it prints into a file of its own, ``LOGS/0`` and ``LOGS/1``. Prints their process
ids and exit codes as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import training_runs


def main() -> None:
    _, logs, *arguments = sys.argv
    go, all_go = os.pipe()
    runs = [start(Path(logs) / str(number), arguments, go, all_go) for number in range(2)]
    os.close(all_go)
    codes = {run: os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]) for run in runs}
    print(json.dumps(list(codes.items())))


def start(log: Path, arguments: list[str], go: int, all_go: int) -> int:
    process = os.fork()
    if process:
        return process
    os.close(all_go)
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv = ["two_runs", *arguments]
        os.read(go, 1)
        training_runs.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
