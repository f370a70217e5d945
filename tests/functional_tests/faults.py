"""Run commands whose system calls fail, or that are killed at a system call, with ``faults.c``."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faults.c")


def library(folder: Path) -> Path:
    """Compile ``faults.c``; skip the test if that isn't possible."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler, to make system calls fail")
    made = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", made, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return made


def run(
    made: Path, command: Sequence[object], *, within: object, **faults: object
) -> subprocess.CompletedProcess[str]:
    """Run ``olmo-bridge`` with faults; faults.c explains the arguments."""
    variables = {f"FAULT_{name.upper()}": str(value) for name, value in faults.items()}
    return subprocess.run(
        [sys.executable, "-m", "megatron_olmo_bridge", *map(str, command)],
        env=os.environ | variables | {"LD_PRELOAD": str(made), "FAULT_IN": str(within)},
        capture_output=True,
        text=True,
    )
