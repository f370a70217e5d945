"""A config is resolved once; what can't be run is refused before anything is built."""

from __future__ import annotations

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.layout import Layout
from megatron_olmo_bridge.training.recipes import apply_overrides
from megatron_olmo_bridge.training.resolve import resolve


def run(*overrides: str) -> TrainingConfig:
    config = TrainingConfig(
        model=dict(published_sizes()["olmo2-tiny"].sizes["olmo2-tiny"]),
        train=StepsConfig(steps=10, global_batch_size=8, sequence_length=64, precision="float32"),
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
def test_what_can_be_run_is_resolved(overrides: list[str], processes: int) -> None:
    config = run(*overrides)
    resolved = resolve(config, None, processes)
    assert (resolved.config, resolved.source) == (config, None)
    assert resolved.bridge.hf_config == config.model
    assert resolved.layout == Layout.of(config, processes)
    provider = resolved.provider
    assert provider.num_layers == config.model["num_hidden_layers"]
    assert provider.tensor_model_parallel_size == config.parallel.tp
    assert provider.pipeline_model_parallel_size == config.parallel.pp


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.tp=2", "parallel.pp=2"], 6, r"tp=2 x parallel.pp=2 takes 4 processes.*not 6"),
        (["parallel.tp=0"], 1, "parallel.tp=0"),
        (["train.micro_batch_size=0"], 1, "train.micro_batch_size=0"),
        (["parallel.tp=3"], 3, r"\(8\) must be a multiple.*\(3\)|8 attention heads.*3"),
        (["parallel.tp=8"], 8, "4 key/value heads|query_groups"),
        (["parallel.pp=3"], 3, "4 layers cannot be divided evenly over 3"),
        (["parallel.vpp=2"], 1, "parallel.vpp=2 cuts up pipeline stages: set parallel.pp"),
        (["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=3"], 2,
         "3 micro-batches of a step must be a multiple of parallel.pp=2"),
        (["parallel.ep=2"], 2, "no experts|num_moe_experts"),
        (["train.global_batch_size=10"], 4, "10 cannot be divided evenly.*a multiple of 4 can"),
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
        resolve(run(*overrides), None, processes)


def test_a_run_needs_a_model() -> None:
    config = run()
    config.model = {}
    with pytest.raises(InputError, match=r"no model.*init\.hf"):
        resolve(config, None, processes=1)


def test_a_classifier_is_not_trained_to_predict_tokens() -> None:
    config = run()
    config.model |= {"architectures": ["Olmo2ForSequenceClassification"], "num_labels": 3}
    with pytest.raises(InputError, match=r"classifier of 3 labels.*predict tokens"):
        resolve(config, None, processes=1)
