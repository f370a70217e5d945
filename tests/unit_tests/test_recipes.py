"""Every recipe, value by value, against what was published.

The numbers here are written down from the sources, not calculated from the recipes.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.models.catalogue import human_count
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.estimate import Estimate, estimate
from megatron_olmo_bridge.training.layout import Layout, minimum_processes
from megatron_olmo_bridge.training.monitor.human import short
from megatron_olmo_bridge.training.named_recipes import named_recipes
from megatron_olmo_bridge.training.recipes import apply_overrides, load_recipe
from megatron_olmo_bridge.training.resolve import bridge_of, resolve

README = Path(__file__).parents[2] / "recipes" / "README.md"

ADAMW = {
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 1.0,
}
OLMO = ADAMW | {
    "optimizer.decayed": "all_but_embeddings",
    "optimizer.z_loss": 1e-5,
    "provider.init_method_std": 0.02,
    "train.precision": "bfloat16",
}
COSINE = {"schedule.decay": "cosine", "schedule.min_lr_ratio": 0.1, "init.optimizer": False}
TO_ZERO = {
    "schedule.decay": "linear",
    "schedule.min_lr_ratio": 0.0,
    "schedule.warmup_steps": 0,
    "init.optimizer": True,
}
SKIPS = {"stability.on_spike": "skip", "stability.sigma": 6.0, "stability.window": 128}


def olmo2(lr: float, batch: int, steps: int, end: int, seed: int) -> dict[str, Any]:
    return OLMO | {
        "optimizer.lr": lr,
        "train.global_batch_size": batch,
        "train.steps": steps,
        "schedule.end_step": end,
        "train.seed": seed,
        "train.sequence_length": 4096,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "olmo2_1b": COSINE | olmo2(4e-4, 512, 1907359, 2384186, 6198) | {"schedule.warmup_steps": 4000},
    "olmo2_1b:stage2": TO_ZERO | olmo2(7.4487e-5, 512, 23852, 23842, 42),
    "olmo2_7b": COSINE | olmo2(3e-4, 1024, 928646, 1192093, 6198) | {"schedule.warmup_steps": 2000},
    "olmo2_7b:stage2": TO_ZERO | olmo2(6.1499e-5, 1024, 11931, 11921, 42),
    "olmo2_13b": COSINE | olmo2(9e-4, 2048, 596057, 596047, 6198) | {"schedule.warmup_steps": 1000},
    "olmo2_13b:stage2": TO_ZERO | olmo2(9e-5, 2048, 11931, 11921, 1110),
    "olmo2_13b:stage2_300b": TO_ZERO | olmo2(9e-5, 2048, 35773, 35763, 2662),
    "olmo2_32b": COSINE
    | SKIPS
    | olmo2(6e-4, 2048, 721901, 774861, 34521)
    | {"schedule.warmup_steps": 2000},
    "olmo2_32b:stage2": TO_ZERO | SKIPS | olmo2(6.6232e-5, 2048, 11921, 11921, 1110),
    "olmo2_32b:stage2_300b": TO_ZERO | SKIPS | olmo2(6.6232e-5, 2048, 35763, 35763, 2662),
    "olmo3_7b": COSINE
    | SKIPS
    | olmo2(3e-4, 512, 597046, 1192093, 34521)
    | {
        "train.sequence_length": 8192,
        "schedule.warmup_steps": 2000,
        "provider.make_vocab_size_divisible_by": 128,
    },
    "olmo3_7b:stage2": TO_ZERO
    | SKIPS
    | olmo2(2.0712352850360292e-4, 256, 47684, 47684, 1337)
    | {"train.sequence_length": 8192, "provider.make_vocab_size_divisible_by": 128},
    "olmoe_1b_7b": COSINE
    | olmo2(4e-4, 1024, 1_200_000, 1192093, 6198)
    | {
        "schedule.warmup_steps": 2500,
        "optimizer.decayed": "all",
        "optimizer.z_loss": 0.0,
        "provider.moe_aux_loss_coeff": 0.01,
        "provider.moe_z_loss_coeff": 0.001,
    },
    "gpt2_124m": COSINE
    | ADAMW
    | {
        "optimizer.lr": 6e-4,
        "optimizer.decayed": "matrices",
        "optimizer.z_loss": 0.0,
        "train.global_batch_size": 480,
        "train.steps": 600_000,
        "train.sequence_length": 1024,
        "train.micro_batch_size": 12,
        "train.seed": 1337,
        "train.precision": "bfloat16",
        "schedule.warmup_steps": 2000,
        "schedule.end_step": 600_000,
        "provider.init_method_std": 0.02,
        "provider.make_vocab_size_divisible_by": 64,
    },
}
"""OLMo-2 1B, 7B and 13B: allenai/OLMo ``configs/official-0425``, ``configs/official-1124``, of 13B
the peak from the launch scripts; 32B and Olmo-3: allenai/OLMo-core ``src/scripts/official``; OLMoE:
allenai/OLMo ``configs/official/OLMoE-1B-7B-0824.yml``; GPT-2: nanoGPT. Steps: revisions on the hub,
the last of each stage or the one that the next stage began with."""

TOTALS = {
    "olmo2_1b": (1_484_916_736, 4.000e12, 2_097_152),
    "olmo2_1b:stage2": (1_484_916_736, 50.0e9, 2_097_152),
    "olmo2_7b": (7_298_617_344, 3.895e12, 4_194_304),
    "olmo2_7b:stage2": (7_298_617_344, 50.0e9, 4_194_304),
    "olmo2_13b": (13_716_198_400, 5.000e12, 8_388_608),
    "olmo2_13b:stage2": (13_716_198_400, 100.1e9, 8_388_608),
    "olmo2_13b:stage2_300b": (13_716_198_400, 300.1e9, 8_388_608),
    "olmo2_32b": (32_234_279_936, 6.056e12, 8_388_608),
    "olmo2_32b:stage2": (32_234_279_936, 100.0e9, 8_388_608),
    "olmo2_32b:stage2_300b": (32_234_279_936, 300.0e9, 8_388_608),
    "olmo3_7b": (7_298_011_136, 2.504e12, 4_194_304),
    "olmo3_7b:stage2": (7_298_011_136, 100.0e9, 2_097_152),
    "olmoe_1b_7b": (6_919_161_856, 5.033e12, 4_194_304),
    "gpt2_124m": (124_439_808, 294.9e9, 491_520),
}
"""Parameters, tokens of the run, and tokens of a step."""


def value(config: TrainingConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    values = getattr(config, section)
    return values[name] if isinstance(values, dict) else getattr(values, name)


def estimated(config: TrainingConfig, processes: int | None = None) -> Estimate:
    """The estimate of a run, by default on the fewest processes."""
    layout = Layout.of(config, processes or minimum_processes(config))
    return estimate(config, bridge_of(config), layout)


def every_recipe() -> list[str]:
    """Names of all that train language models; a test of its own has the classifier's."""
    return [r.name for r in named_recipes() if r.file.parent.name != "classification"]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_values_are_the_published_ones(recipe: str) -> None:
    config, expected = load_recipe(recipe), PUBLISHED[recipe]
    assert {key: value(config, key) for key in expected} == expected


@pytest.mark.parametrize("recipe", TOTALS)
def test_parameters_tokens_and_batch_are_the_published_ones(recipe: str) -> None:
    found = estimated(load_recipe(recipe))
    parameters, tokens, step = TOTALS[recipe]
    assert (found.parameters, found.tokens_per_step) == (parameters, step)
    assert found.tokens == pytest.approx(tokens, rel=1e-3)


def test_no_recipe_was_forgotten() -> None:
    pinned = {load_recipe(recipe).name for recipe in PUBLISHED} | {"olmo2-tiny"}
    assert {load_recipe(recipe).name for recipe in every_recipe()} == pinned


@pytest.mark.parametrize("recipe", every_recipe())
def test_what_a_recipe_sets_has_a_source(recipe: str) -> None:
    config, usual = load_recipe(recipe), TrainingConfig()
    assert "model" in config.sources
    for section in fields(config):
        values, defaults = getattr(config, section.name), getattr(usual, section.name)
        if section.name == "provider":
            names = list(values)
        elif is_dataclass(values):
            names = [n for n, v in asdict(values).items() if v != getattr(defaults, n)]
        else:
            continue
        for name in names:
            key = f"{section.name}.{name}"
            assert config.sources.get(key) or config.sources.get(section.name), key


@pytest.mark.parametrize("recipe", every_recipe())
def test_sources_are_of_fields(recipe: str) -> None:
    config = load_recipe(recipe)
    for key in config.sources:
        if "." in key:
            value(config, key)
        else:
            assert hasattr(config, key)


@pytest.mark.parametrize("recipe", every_recipe())
def test_a_recipe_survives_the_command_line(recipe: str) -> None:
    config = load_recipe(recipe)
    assert apply_overrides(config, []) == config


@pytest.mark.parametrize("recipe", every_recipe())
def test_a_recipe_can_be_run(recipe: str) -> None:
    config = load_recipe(recipe)
    processes = {"olmo2-tiny": 1, "gpt2-124m": 8}.get(config.name, 16)
    stage_1 = ["init.checkpoint=stage-1"] if config.init.optimizer else []
    resolve(apply_overrides(config, stage_1), None, processes)
    assert load_recipe(recipe) == config, "a recipe's function makes a new config each time"
    if config.name != "olmo2-tiny":
        assert estimated(config, processes).worst.total < 75e9, "fits GPUs of 80 GB"


def cosine(peak: float, step: int, warmup: int, end: float) -> float:
    done = (step - warmup) / (end - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def test_stage_2_begins_where_stage_1_ended() -> None:
    """The published value of 7B is 0.2 % off; 13B had reached a tenth of its peak."""
    ends = {
        "1b": cosine(4e-4, 1907359, 4000, 5e12 / (512 * 4096)),
        "7b": cosine(3e-4, 928646, 2000, 5e12 / (1024 * 4096)),
        "13b": 9e-5,
        "32b": cosine(6e-4, 721901, 2000, 6.5e12 / (2048 * 4096)),
    }
    for size, lr in ends.items():
        stage2 = load_recipe(f"olmo2_{size}:stage2")
        assert stage2.optimizer.lr == pytest.approx(lr, rel=1e-2 if size == "7b" else 1e-5)


def test_the_rate_of_olmo3s_stage_2_is_that_of_stage_1s_cosine_after_2t_tokens() -> None:
    after = 2e12 / (512 * 8192)
    assert load_recipe("olmo3_7b:stage2").optimizer.lr == pytest.approx(
        cosine(3e-4, round(after + 0.5), 2000, 5e12 / (512 * 8192)), rel=1e-6
    )


@pytest.mark.parametrize("recipe", [name for name in PUBLISHED if "olmo" in name])
def test_a_schedule_in_tokens_ends_at_the_first_step_that_has_all_of_them(recipe: str) -> None:
    config = load_recipe(recipe)
    tokens = config.schedule.end_step * config.tokens_per_step
    published = round(tokens / 1e10) * 1e10
    assert published <= tokens < published + config.tokens_per_step


def test_the_launch_scripts_of_13b_override_the_rate_and_not_the_warmup() -> None:
    sources = load_recipe("olmo2_13b").sources
    assert "scripts/augusta/peteish13.sh" in sources["optimizer.lr"]
    assert "scripts/beaker/peteish/peteish13-highlr.sh" in sources["optimizer.lr"]
    assert "OLMo2-13B-stage1.yaml" in sources["schedule.warmup_steps"]


def test_the_tiny_one_is_for_a_laptop() -> None:
    config = load_recipe("olmo2_tiny")
    assert config.train.precision == "float32"
    assert estimated(config).worst.total < 500e6
    resolve(apply_overrides(config, ["parallel.tp=2", "parallel.sp=true"]), None, 4)


def test_the_readmes_table() -> None:
    rows = re.findall(r"^\| `(.+?)` \|(.+)\|$", README.read_text(), re.M)
    assert len(rows) >= len(PUBLISHED) + 1
    for recipe, row in rows:
        config = load_recipe(recipe)
        cells = [cell.strip() for cell in row.split("|")]
        found = estimated(config, int(cells[3]))
        parallel = config.parallel
        assert cells == [
            human_count(found.parameters),
            short(found.tokens),
            f"{found.steps:,}",
            cells[3],
            f"{parallel.tp} x {parallel.pp} x {found.data_parallel_size}",
            f"{found.worst.total / 1e9:.1f}",
        ]
