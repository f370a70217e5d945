"""How much memory does it take to save a checkpoint, by the format of the optimizer's state?

A training step and then a save by each of 4 data-parallel processes on gloo, with the distributed
optimizer. On a CPU there is one memory for what is the GPU's and the host's elsewhere: the figures
are the growth of each process's peak resident memory (VmHWM, reset before the save) over its
resident memory before the save. The helper processes that write the files are not counted: they
share their memory with the process that forked them.

    python benchmarks/saving.py --processes 4
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import socket
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 4096,
}
FORMATS = {
    # fully_reshardable; gathered on the first data-parallel rank only
    "fully_reshardable, gathered on every rank": (True, False),
    "fully_reshardable, gathered on the first rank": (True, True),
    "dp_reshardable": (False, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    processes = parser.parse_args().processes
    for name in FORMATS:
        parameters, grown = measured(name, processes)
        each = ", ".join(f"{value / 1e6:.0f}" for value in grown)
        print(
            f"{name}: {each} MB in ranks 0 to {processes - 1}; {sum(grown) / 1e6:.0f} MB in all, "
            f"{max(grown) / parameters:.1f} and {min(grown) / parameters:.1f} bytes a parameter",
            flush=True,
        )


def measured(name: str, processes: int) -> tuple[int, list[int]]:
    """Parameters of the model, and bytes by which each rank's memory grows."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        pipes = [context.Pipe(duplex=False) for _ in range(processes)]
        ranks = [
            context.Process(target=save, args=(pipe[1], name, rank, processes, port, folder))
            for rank, pipe in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        answers = [pipe[0].recv() for pipe in pipes]
        for rank in ranks:
            rank.join()
    return answers[0][0], [grown for _, grown in answers]


def save(answer: Connection, name: str, rank: int, processes: int, port: int, folder: str) -> None:
    """Take a step, save, and answer with the parameters and the growth of memory."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from megatron_olmo_bridge.tasks.language_modelling import LanguageModelling
    from megatron_olmo_bridge.training import checkpoint
    from megatron_olmo_bridge.training.loop import one_step
    from megatron_olmo_bridge.training.model_size import parameter_count
    from megatron_olmo_bridge.training.resolve import resolve
    from megatron_olmo_bridge.training.setup import started

    fully, memory_efficient = FORMATS[name]
    original = checkpoint.content_metadata
    checkpoint.content_metadata = lambda *a, **k: (
        original(*a, **k) | {"distrib_optim_fully_reshardable_mem_efficient": memory_efficient}
    )
    resolved = resolve(config_of(Path(folder), processes), None, processes)
    with started(resolved, LanguageModelling.open, say=lambda line: None) as run:
        one_step(run, run.task.train_batches(begin=1))
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run.checkpointer.save(1, {}, fully_reshardable=fully)
        answer.send((parameter_count(resolved.bridge), memory("VmHWM") - before))


def config_of(folder: Path, processes: int) -> Any:
    """The run of a small model on made-up tokens, in bfloat16."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge
    from megatron_olmo_bridge.training import config as c

    length = 32
    prefix = folder / f"data-{os.environ['RANK']}"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.zeros(64 * length, dtype=torch.long))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return c.TrainingConfig(
        model=Olmo2Bridge.sizes["olmo2-tiny"] | MODEL,
        train=c.StepsConfig(2, processes, 1, length, "bfloat16"),
        data=c.DataConfig([str(folder / "data-0")], cache=str(folder / "cache")),
        schedule=c.ScheduleConfig(decay="constant"),
        checkpoint=c.CheckpointConfig(save=str(folder / "run")),
    )


def memory(field: str) -> int:
    """Bytes of a field of this process's ``/proc/self/status``."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
