"""Start the stock Megatron scripts beside this file as real processes, and say what went wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TOKENS = [[(7 * row + 13 * column * column) % 1000 for column in range(16)] for row in range(2)]
"""A fixed batch, 2 x 16, for vocabularies of 1000 tokens and more."""


def run_script(name: str, *arguments: object, processes: int = 1) -> str:
    """Run a script, under torchrun where it takes several processes; returns what it printed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += [str(HERE / name), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    if done.returncode:
        raise AssertionError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def stock(action: str, *arguments: object, processes: int = 1) -> str:
    """Run ``stock_megatron.py``."""
    return run_script("stock_megatron.py", action, *arguments, processes=processes)


def tokens_argument() -> str:
    return json.dumps(TOKENS)
