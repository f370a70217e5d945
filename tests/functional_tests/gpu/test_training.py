"""Pretraining the 1B model in bfloat16 on Transformer Engine: what it learns, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.tasks.train import train
from megatron_olmo_bridge.training.checkpoint import Checkpointer
from megatron_olmo_bridge.training.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)
from megatron_olmo_bridge.training.monitor.history import RunHistory

Record = Callable[..., None]
STEPS, BATCH, LENGTH = 12, 8, 4096


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Text of a language with a hundred words: quickly learned."""
    prefix = tmp_path / "data"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    words = torch.randint(0, 100, (STEPS * BATCH * LENGTH + 1,), generator=torch.manual_seed(0))
    builder.add_item(words)
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_pretraining_1b(micro_batch_size: int, data: str, tmp_path: Path, record: Record) -> None:
    config = TrainingConfig(
        name="1b",
        model=dict(published_sizes()["olmo2-1b"].sizes["olmo2-1b"]),
        provider={"init_method_std": 0.02, "init_truncation": 3.0},
        train=StepsConfig(STEPS, BATCH, micro_batch_size, LENGTH, "bfloat16"),
        data=DataConfig([data]),
        optimizer=OptimizerConfig(lr=1e-3, z_loss=1e-5),
        schedule=ScheduleConfig(warmup_steps=2, decay="constant"),
        checkpoint=CheckpointConfig(save=str(tmp_path / "run"), interval=STEPS),
        logging=LoggingConfig(interval=2),
    )
    train(config)
    lines = [line for line in RunHistory.read(tmp_path / "run").steps if line["step"] > 4]
    speed = sum(line["tokens_per_second"] for line in lines) / len(lines)
    losses = [line["loss"] for line in lines]
    record(
        f"1B, bfloat16, micro-batch {micro_batch_size}, {LENGTH} tokens",
        tokens_per_second=speed,
        utilisation=lines[-1].get("utilisation"),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        losses=losses,
    )
    assert losses[-1] < losses[0]
    assert losses[-1] < 8, "of 100352 tokens, guessing costs 11.5 nats and 100 words cost 4.6"


@pytest.mark.parametrize("fully_reshardable", ["none", "all"])
def test_saving_takes_no_gpu_memory(
    fully_reshardable: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a few MB: what is staged or gathered is on the host."""
    config = TrainingConfig(
        model=dict(published_sizes()["olmo2-1b"].sizes["olmo2-1b"]),
        train=StepsConfig(1, 1, 1, 128, "bfloat16"),
        data=DataConfig([data]),
        schedule=ScheduleConfig(decay="constant"),
        checkpoint=CheckpointConfig(
            save=str(tmp_path / "run"), fully_reshardable=fully_reshardable
        ),
    )
    original, grown = Checkpointer.save, []

    def measured(*args: Any, **options: Any) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        original(*args, **options)
        grown.append(torch.cuda.max_memory_allocated() - before)

    monkeypatch.setattr(Checkpointer, "save", measured)
    train(config)
    assert len(grown) == 1 and grown[0] < 16 * 2**20
