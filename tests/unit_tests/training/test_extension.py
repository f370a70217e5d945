"""A run that is extended: what becomes of its learning rate and of the order of its data."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.training.config import DataConfig, StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.extension import Extension

TOKENS, LENGTH, BATCH = 801, 8, 4
"""25 steps read the data once."""


def extension(planned: int, steps: int, end: int | None = None, decay: str = "cosine") -> Extension:
    config = TrainingConfig(train=StepsConfig(steps, BATCH, sequence_length=LENGTH))
    config.schedule.decay, config.schedule.end_step = decay, end
    return Extension(config, planned, planned)


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
def test_the_learning_rate_must_be_chosen(decay: str) -> None:
    with pytest.raises(InputError) as error:
        extension(10, 15, decay=decay).check()
    for line in (
        f"rate ({decay}) was to reach its minimum at step 10.",
        "  schedule.end_step=10: as planned; the steps after 10 are taken at the minimum, 3e-05",
        "  schedule.end_step=15: as in a run of 15 steps;",
    ):
        assert line in str(error.value)


def test_a_constant_one_needs_no_choice() -> None:
    extension(10, 15, decay="constant").check()


@pytest.mark.parametrize(
    ("end", "decay", "says"),
    [
        (10, "cosine", "the learning rate is as planned, at its minimum from step 10 on"),
        (15, "cosine", "the learning rate is from here on that of a schedule that ends at step 15"),
        (None, "constant", "the learning rate is constant"),
    ],
)
def test_it_is_said(end: int | None, decay: str, says: str) -> None:
    extended = extension(10, 15, end, decay)
    extended.check()
    assert extended.message() == f"from 10 to 15 steps; {says}"


@pytest.mark.parametrize(
    ("planned", "steps"), [(10, 24), (10, 25), (24, 26), (10, 30), (26, 30), (30, 40), (30, 50)]
)
def test_the_order_of_the_data_as_megatron_has_it(tmp_path: Path, planned: int, steps: int) -> None:
    """It is said to be another exactly if the samples of the planned steps are others."""
    builder = IndexedDatasetBuilder(f"{tmp_path}/data.bin", dtype=np.uint16)
    for begin in range(0, TOKENS, 9):
        builder.add_item(torch.arange(begin, min(begin + 9, TOKENS)))
        builder.end_document()
    builder.finalize(f"{tmp_path}/data.idx")
    extended = extension(planned, steps, decay="constant")
    extended.config.data = DataConfig([f"{tmp_path}/data"], cache=f"{tmp_path}/cache")

    before, after = (samples(extended.config, count, planned) for count in (planned, steps))

    assert ("another order" in extended.message()) == (before != after)


def samples(config: TrainingConfig, steps: int, first: int) -> list[list[int]]:
    """The sequences of the first steps of a run of this many steps."""
    from megatron_olmo_bridge.runtime.cpu import cpu_runtime
    from megatron_olmo_bridge.training.token_data import TokenData

    planned, config.train.steps = config.train.steps, steps
    with cpu_runtime():
        data = TokenData.open(config, vocab_size=1000).train
    config.train.steps = planned
    return [data[i]["tokens"].tolist() for i in range(first * BATCH)]
