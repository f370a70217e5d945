"""Runs the scripts beside this file in forked processes, which needn't import torch and
megatron-core again: that takes five seconds a process, longer than most scripts run.

One job is read from each line of standard input, as JSON: ``script``, ``arguments``, ``processes``,
``folder`` (to run in) and ``log`` (a file for all that they print); the answer is a line with their
exit codes. The processes find each other as under torchrun.

What is imported at the top is what megatron-core's checkpoint writer imports once more, in the
process that it starts: little.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing.util
import os
import socket
import sys
from typing import Any

# Tests of the CPU runtime, also where there is a GPU: they take up to four processes.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def import_all() -> None:
    import matplotlib.backends.backend_svg  # noqa: F401
    import megatron.core.optimizer  # noqa: F401
    import transformers.models.olmo2.modeling_olmo2  # noqa: F401

    import megatron_olmo_bridge.live.auto_bridge
    import megatron_olmo_bridge.tasks.language_modelling  # noqa: F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(job: dict[str, Any]) -> list[int]:
    """Fork the job's processes; returns their ids. In such a process, does not return."""
    port = free_port()
    children = []
    for rank in range(job["processes"]):
        child = os.fork()
        if not child:
            become(job, rank, port)
        children.append(child)
    return children


def become(job: dict[str, Any], rank: int, port: int) -> None:
    """A process of the job."""
    os.chdir(job["folder"])
    os.environ |= job["environment"]
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["processes"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["processes"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    sys.argv = [job["script"], *job["arguments"]]
    importlib.import_module(job["script"]).main()
    multiprocessing.util._exit_function()  # ends the helper of megatron-core's checkpoint writer
    sys.stdout.flush()
    os._exit(0)  # to take down all that was imported takes a second


def wait_for_all(children: list[int]) -> list[int]:
    """Exit codes. Where one fails, the others are not waited for: they may be waiting for it."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in set(children) - set(codes):
                os.kill(other, 9)
    return [codes[child] for child in children]


def main() -> None:
    import_all()
    gc.freeze()  # else each child's first collection would copy all of this memory
    for line in sys.stdin:
        print(json.dumps(wait_for_all(start(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
