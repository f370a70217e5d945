"""What can't be run is refused before anything is built, with one clear message."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.bridge import published_sizes
from megatron_olmo_bridge.training.config import TrainConfig, TrainingConfig
from megatron_olmo_bridge.training.layout import Layout, checks, smallest
from megatron_olmo_bridge.training.recipes import apply_overrides


def run(*overrides: str, size: str = "olmo2-tiny") -> TrainingConfig:
    config = TrainingConfig(
        model=dict(published_sizes()[size].sizes[size]),
        train=TrainConfig(steps=10, global_batch_size=8, sequence_length=64, precision="float32"),
    )
    return apply_overrides(config, overrides)


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ([], 1),
        (["parallel.tp=2", "parallel.sp=true"], 8),
        (["parallel.pp=2", "parallel.vpp=2"], 4),
        (["parallel.recompute=full", "train.precision=bfloat16"], 2),
        (["provider.num_layers_in_first_pipeline_stage=1", "parallel.pp=2"], 2),
    ],
)
def test_what_can_be_is_let_through(overrides: list[str], processes: int) -> None:
    checks(run(*overrides), processes)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.tp=2", "parallel.pp=2"], 6, r"tp=2 x parallel.pp=2 takes 4 processes.*not 6"),
        (["parallel.tp=0"], 1, "parallel.tp=0"),
        (["train.micro_batch_size=0"], 1, "train.micro_batch_size=0"),
        (["parallel.tp=3"], 3, r"\(8\) must be a multiple.*\(3\)|8 attention heads.*3"),
        (["parallel.tp=8"], 8, "4 key/value heads|query_groups"),
        (["parallel.pp=3"], 3, "4 layers cannot be shared out evenly over 3"),
        (["parallel.vpp=2"], 1, "parallel.vpp=2 cuts up pipeline stages: set parallel.pp"),
        (["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=3"], 2,
         "3 micro-batches of a step must be a multiple of parallel.pp=2"),
        (["parallel.ep=2"], 2, "no experts|num_moe_experts"),
        (["train.global_batch_size=10"], 4, "10 cannot be shared out.*a multiple of 4 can"),
        (["train.micro_batch_size=3"], 1, "a multiple of 3 can"),
        (["parallel.sp=true"], 1, "parallel.tp, which is 1"),
        (["parallel.tp=2", "parallel.sp=true", "train.sequence_length=63"], 2,
         "sequence_length=63 .* multiple of parallel.tp=2"),
        (["train.sequence_length=4097"], 1, "4097 is more than the model's 4096 positions"),
        (["train.precision=float16"], 1, "'float16' is none of float32, bfloat16"),
        (["parallel.recompute=some"], 1, "'some' is none of none, selective, full"),
        (["provider.nonsense=1"], 1, "provider.nonsense: the provider has no such field"),
        (["train.steps=0"], 1, "train.steps=0"),
        (["schedule.warmup_steps=10"], 1, "warmup_steps=10"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(overrides: list[str], processes: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checks(run(*overrides), processes)


def test_processes_that_a_layout_takes() -> None:
    assert smallest(run("parallel.tp=2", "parallel.pp=2")) == 4
    experts = run("parallel.tp=2", "parallel.ep=4", size="olmoe-tiny")
    assert smallest(experts) == 8
    alone: Any = apply_overrides(experts, ["provider.expert_tensor_parallel_size=1"])
    assert smallest(alone) == 4
    found = Layout.of(alone, 8)
    assert (found.dp, found.expert_dp, found.micro_batches) == (4, 2, 2)
