"""The learning rate of every step against closed formulas, and each parameter's weight decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import (
    OptimizerConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)
from megatron_olmo_bridge.training.optimizer import (
    check_schedule,
    ddp_config,
    make_optimizer,
    make_scheduler,
)
from megatron_olmo_bridge.training.resolve import resolve

STEPS, WARMUP, PEAK, LOWEST = 40, 8, 0.5, 0.1


def run(**schedule: Any) -> TrainingConfig:
    return TrainingConfig(
        train=StepsConfig(steps=STEPS),
        optimizer=OptimizerConfig(lr=PEAK),
        schedule=ScheduleConfig(warmup_steps=WARMUP, min_lr_ratio=LOWEST / PEAK, **schedule),
    )


def scheduled(config: TrainingConfig) -> tuple[Any, Any]:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(parameters, lr=config.optimizer.lr)
    return make_scheduler(config, optimizer), optimizer.param_groups[0]


def rates(config: TrainingConfig, steps: int = STEPS) -> list[float]:
    """Return the learning rates of steps 1, 2, 3, ...: the scheduler steps before the optimizer."""
    scheduler, group = scheduled(config)
    found = []
    for _ in range(steps):
        scheduler.step(1)
        found.append(group["lr"])
    return found


def cosine(step: int, end: int = STEPS) -> float:
    share = (step - WARMUP) / (end - WARMUP)
    return LOWEST + (PEAK - LOWEST) * (1 + math.cos(math.pi * share)) / 2


def linear(step: int, end: int = STEPS) -> float:
    return PEAK - (PEAK - LOWEST) * (step - WARMUP) / (end - WARMUP)


def stable_then_down(step: int) -> float:
    return PEAK - (PEAK - LOWEST) * max(0, step - (STEPS - 10)) / 10


def stable(step: int) -> float:
    return PEAK


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ({"decay": "cosine"}, cosine),
        ({"decay": "linear"}, linear),
        ({"decay": "wsd", "wsd_decay_steps": 10}, stable_then_down),
        ({"decay": "constant"}, stable),
    ],
)
def test_every_step(schedule: dict[str, Any], formula: Any) -> None:
    expected = [
        PEAK * step / WARMUP if step <= WARMUP else formula(step) for step in range(1, STEPS + 1)
    ]
    found = rates(run(**schedule))
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[WARMUP - 1] == PEAK
    assert found[-1] == pytest.approx(PEAK if formula is stable else LOWEST)


def test_without_warmup_the_first_step_is_one_below_the_peak() -> None:
    config = run(decay="linear")
    config.schedule.warmup_steps = 0
    assert rates(config)[0] == pytest.approx(PEAK - (PEAK - LOWEST) / STEPS)


def test_a_schedule_that_ends_after_the_run() -> None:
    found = rates(run(decay="cosine", end_step=60))
    assert found[-1] == pytest.approx(cosine(STEPS, end=60))


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_schedule_that_ends_before_the_run_stays_at_the_minimum(decay: str) -> None:
    found = rates(run(decay=decay, end_step=20))
    assert found[18] > LOWEST
    assert found[19:] == [pytest.approx(LOWEST)] * 21


def test_a_resumed_run_goes_on_where_it_was() -> None:
    scheduler, group = scheduled(run())
    scheduler.step(15)
    scheduler.step(1)
    assert group["lr"] == rates(run())[15]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"warmup_steps": 40}, "warmup_steps=40 must be less than the 40 steps"),
        ({"warmup_steps": 10, "end_step": 10}, "warmup_steps=10 must be less than the 10 steps"),
        ({"decay": "wsd"}, "wsd_decay_steps=0 must be at least 1, and at most the 40 steps"),
        ({"decay": "wsd", "warmup_steps": 5, "wsd_decay_steps": 36}, "=36 .* at most the 35 steps"),
    ],
)
def test_numbers_of_steps_that_do_not_fit(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_schedule(ScheduleConfig(**schedule), StepsConfig(steps=STEPS))


def test_the_step_at_which_a_schedule_ends() -> None:
    train = StepsConfig(steps=STEPS)
    assert check_schedule(ScheduleConfig(), train) == STEPS
    assert check_schedule(ScheduleConfig(end_step=99), train) == 99
    assert check_schedule(ScheduleConfig(decay="wsd", wsd_decay_steps=STEPS), train) == STEPS


# ---------------------------------------------------------------------------------- weight decay

CHOICES = ("all_but_embeddings", "matrices", "all")
OLMO2 = """
    embedding.word_embeddings.weight                             0     0.1   0.1
    decoder.layers.0.self_attention.linear_qkv.weight            0.1   0.1   0.1
    decoder.layers.0.self_attention.q_layernorm.weight           0.1   0     0.1
    decoder.layers.0.self_attention.k_layernorm.weight           0.1   0     0.1
    decoder.layers.0.self_attention.linear_proj.weight           0.1   0.1   0.1
    decoder.layers.0.self_attention.linear_proj.post_layernorm.weight  0.1  0  0.1
    decoder.layers.0.mlp.linear_fc1.weight                       0.1   0.1   0.1
    decoder.layers.0.mlp.linear_fc2.weight                       0.1   0.1   0.1
    decoder.layers.0.mlp.linear_fc2.post_layernorm.weight        0.1   0     0.1
    decoder.final_layernorm.weight                               0.1   0     0.1
    output_layer.weight                                          0.1   0.1   0.1
"""
"""Every parameter, and its decay under each of the choices. ``all_but_embeddings`` is OLMo's: see
``olmo_weight_decay``."""
GPT2 = """
    embedding.word_embeddings.weight                             0     0.1   0.1
    embedding.position_embeddings.weight                         0     0.1   0.1
    decoder.layers.0.input_layernorm.weight                      0.1   0     0.1
    decoder.layers.0.input_layernorm.bias                        0.1   0     0.1
    decoder.layers.0.self_attention.linear_qkv.weight            0.1   0.1   0.1
    decoder.layers.0.self_attention.linear_qkv.bias              0.1   0     0.1
    decoder.layers.0.self_attention.linear_proj.weight           0.1   0.1   0.1
    decoder.layers.0.self_attention.linear_proj.bias             0.1   0     0.1
    decoder.layers.0.pre_mlp_layernorm.weight                    0.1   0     0.1
    decoder.layers.0.pre_mlp_layernorm.bias                      0.1   0     0.1
    decoder.layers.0.mlp.linear_fc1.weight                       0.1   0.1   0.1
    decoder.layers.0.mlp.linear_fc1.bias                         0.1   0     0.1
    decoder.layers.0.mlp.linear_fc2.weight                       0.1   0.1   0.1
    decoder.layers.0.mlp.linear_fc2.bias                         0.1   0     0.1
    decoder.final_layernorm.weight                               0.1   0     0.1
    decoder.final_layernorm.bias                                 0.1   0     0.1
"""
"""``matrices`` is GPT-2's, as nanoGPT trains it: all of two dimensions, the tied embedding too."""


def decays(size: str, decayed: str, precision: str) -> dict[str, float]:
    """What AdamW is told of each parameter, once the schedule was stepped."""
    config = TrainingConfig(
        model=dict(published_sizes()[size].sizes[size]) | {"num_hidden_layers": 1, "n_layer": 1},
        train=StepsConfig(steps=9, sequence_length=64, precision=precision),
        optimizer=OptimizerConfig(weight_decay=0.1, decayed=decayed),
    )
    config.parallel.distributed_optimizer = False  # which would hold slices of them
    provider = resolve(config, None, processes=1).provider
    chunks = provider.provide_distributed_model(ddp_config(config.parallel))
    optimizer = make_optimizer(config, chunks)
    make_scheduler(config, optimizer).step(1)
    held = [
        group
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in part.param_groups
    ]
    of = {}
    for name, parameter in chunks[0].named_parameters():
        (group,) = [g for g in held if any(p is main_of(parameter) for p in g["params"])]
        of[name.rpartition("module.")[2]] = group["weight_decay"]
    return of


def main_of(parameter: Any) -> Any:
    """The float32 weights that the optimizer works on."""
    return getattr(parameter, "main_param", parameter)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("decayed", CHOICES)
@pytest.mark.parametrize(("size", "table"), [("olmo2-tiny", OLMO2), ("gpt2-tiny", GPT2)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_each_parameters_weight_decay(size: str, table: str, decayed: str, precision: str) -> None:
    rows = [line.split() for line in table.strip().splitlines()]
    expected = {name: float(values[CHOICES.index(decayed)]) for name, *values in rows}
    assert decays(size, decayed, precision) == expected
