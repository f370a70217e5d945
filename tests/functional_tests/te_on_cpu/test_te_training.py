"""Training with Transformer Engine's modules and its FusedAdam: learns what the local backend
learns, and goes on from a checkpoint as if it had not been stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import TRACKER, write_data

from megatron_olmo_bridge import export_checkpoint
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups
from megatron_olmo_bridge.tasks.train import train
from megatron_olmo_bridge.training.config import (
    CheckpointConfig,
    DataConfig,
    InitConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)
from megatron_olmo_bridge.training.monitor.history import RunHistory

SIZES = [name for name in published_sizes() if name.endswith("-tiny")]
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("data") / "train"
    write_data(prefix, [(n + np.arange(100)) % 900 for n in random.integers(0, 900, 60)])
    return prefix


def losses(
    folder: Path,
    data: Path,
    size: str,
    *,
    precision: str = "bfloat16",
    distributed: bool = True,
    backend: str = "transformer_engine",
    start: Path | None = None,
) -> list[float]:
    """Return the losses of a run in a folder; resume it if the folder has one."""
    config = TrainingConfig(
        name="te",
        model={} if start else dict(published_sizes()[size].sizes[size]),
        provider={"init_method_std": 0.02, "init_truncation": 3.0, "backend": backend},
        train=StepsConfig(
            steps=STEPS,
            global_batch_size=4,
            micro_batch_size=2,
            sequence_length=32,
            precision=precision,
        ),
        data=DataConfig(path=[str(data)]),
        optimizer=OptimizerConfig(lr=1e-3, z_loss=1e-5),
        schedule=ScheduleConfig(warmup_steps=2, decay="constant"),
        checkpoint=CheckpointConfig(save=str(folder), interval=STEPS // 2),
        logging=LoggingConfig(interval=1),
        parallel=ParallelConfig(distributed_optimizer=distributed),
        init=InitConfig(hf=str(start) if start else None),
    )
    train(config, say=lambda *_: None)
    destroy_process_groups()
    return [line["loss"] for line in RunHistory.read(folder).steps]


@pytest.mark.parametrize(
    ("size", "distributed"), [*((size, True) for size in SIZES), ("olmo2-tiny", False)]
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    size: str, distributed: bool, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    whole = losses(run, data, size, distributed=distributed)
    assert len(whole) == STEPS
    shutil.rmtree(run / f"iter_{STEPS:07d}")
    (run / TRACKER).write_text(str(STEPS // 2))
    assert losses(run, data, size, distributed=distributed) == whole
    export_checkpoint(run, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("size", SIZES)
def test_float32_losses_equal_those_of_the_local_backend(
    size: str, data: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    ours, local = (
        losses(
            tmp_path / backend,
            data,
            size,
            precision="float32",
            backend=backend,
            start=checkpoint(size),
        )
        for backend in ("transformer_engine", "local")
    )
    assert local[-1] < local[0] - 0.02
    torch.testing.assert_close(ours, local, rtol=0, atol=2e-5)
