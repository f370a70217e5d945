"""How many processes a layout takes, and how it divides the batch."""

from __future__ import annotations

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.layout import Layout, minimum_processes
from megatron_olmo_bridge.training.recipes import apply_overrides


def run(*overrides: str, size: str = "olmo2-tiny") -> TrainingConfig:
    config = TrainingConfig(
        model=dict(published_sizes()[size].sizes[size]),
        train=StepsConfig(steps=10, global_batch_size=8, sequence_length=64, precision="float32"),
    )
    return apply_overrides(config, overrides)


def test_processes_that_a_layout_takes() -> None:
    assert minimum_processes(run("parallel.tp=2", "parallel.pp=2")) == 4
    experts = run("parallel.tp=2", "parallel.ep=4", size="olmoe-tiny")
    assert minimum_processes(experts) == 8
    whole = apply_overrides(experts, ["provider.expert_tensor_parallel_size=1"])
    assert minimum_processes(whole) == 4
    layout = Layout.of(whole, 8)
    assert (layout.dp, layout.expert_dp, layout.micro_batches) == (4, 2, 2)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.tp=2", "parallel.pp=2"], 6, r"parallel\.tp=2 x parallel\.pp=2 takes 4 .*not 6"),
        (
            ["provider.expert_tensor_parallel_size=2"],
            1,
            r"provider\.expert_tensor_parallel_size=2 takes 2 processes .*not 1\.",
        ),
        ([], 0, "^a run takes 1 processes .*not 0"),
    ],
)
def test_the_sizes_that_take_more_processes_are_named(
    overrides: list[str], processes: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Layout.of(run(*overrides, size="olmoe-tiny"), processes)
