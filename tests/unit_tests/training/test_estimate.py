"""Resources that a run needs, against numbers that were worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models.families import published_sizes as sizes
from megatron_olmo_bridge.training.config import ParallelConfig, StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.estimate import (
    Estimate,
    estimate,
    tensor_parallel_shards,
)
from megatron_olmo_bridge.training.layout import Layout, minimum_processes
from megatron_olmo_bridge.training.resolve import bridge_of

LAYERS, VOCABULARY = 4, 1024
"""Sizes of olmo2-tiny, which has 8 heads and 4 key/value heads of 16."""


def model(size: str = "olmo2-tiny") -> dict[str, Any]:
    return dict(sizes()[size].sizes[size])


def run(size: str = "olmo2-tiny", provider: dict[str, Any] | None = None, **parallel: Any) -> Any:
    return TrainingConfig(
        model=model(size),
        provider=provider or {},
        train=StepsConfig(steps=10, global_batch_size=32, micro_batch_size=2, sequence_length=64),
        parallel=ParallelConfig(**parallel),
    )


def estimated(config: TrainingConfig, processes: int | None = None) -> Estimate:
    """Return the estimate of a run, by default on the fewest processes."""
    layout = Layout.of(config, processes or minimum_processes(config))
    return estimate(config, bridge_of(config), layout)


# ---------------------------------------------------------------------------- tokens, parameters


def test_tokens_and_batches() -> None:
    found = estimated(run(tp=2), processes=8)
    assert (found.processes, found.data_parallel_size, found.micro_batches) == (8, 4, 4)
    assert (found.steps, found.sequences, found.tokens) == (10, 320, 320 * 64)
    assert found.tokens_per_step == 32 * 64


def test_the_fewest_processes_are_the_default() -> None:
    assert estimated(run(tp=2, pp=2)).processes == 4
    assert estimated(run("olmoe-tiny", tp=2, ep=2)).processes == 4
    one = {"expert_tensor_parallel_size": 1}
    assert estimated(run("olmoe-tiny", one, tp=2, ep=2)).processes == 2


def test_padding_of_the_vocabulary_counts_on_the_rank_only() -> None:
    plain = estimated(run("gpt2-124m"))
    padded = estimated(run("gpt2-124m", {"make_vocab_size_divisible_by": 128}))
    assert (plain.padded_vocab_size, padded.padded_vocab_size) == (50257, 50304)
    assert plain.parameters == padded.parameters == plain.stages[0].parameters
    assert padded.stages[0].parameters - plain.stages[0].parameters == 47 * 768
    assert estimated(run("gpt2-124m", tp=2)).padded_vocab_size == 50258


# ------------------------------------------------------------------------------------------ FLOPs


def test_flops_of_published_sizes_are_near_six_per_parameter() -> None:
    for size in ("olmo2-1b", "olmo2-7b", "olmo2-13b", "olmo2-32b"):
        found = estimated(run(size))
        assert 1.0 < found.flops_per_token / (6 * found.parameters_without_embeddings) < 1.02
        assert found.flops == found.flops_per_token * found.tokens


def test_gpu_days() -> None:
    found = estimated(
        replace(run("olmo2-7b"), train=StepsConfig(steps=928_646, global_batch_size=1024))
    )
    assert found.gpu_days == pytest.approx(found.flops / 989e12 / 0.4 / 86400)
    assert 5000 < found.gpu_days < 5200


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("embedding.word_embeddings.weight", 2),
        ("embedding.position_embeddings.weight", 1),
        ("output_layer.weight", 2),
        ("decoder.final_layernorm.weight", 1),
        ("decoder.layers.*.self_attention.linear_qkv.weight", 2),
        ("decoder.layers.*.self_attention.linear_qkv.bias", 2),
        ("decoder.layers.*.self_attention.linear_qkv.layer_norm_weight", 1),
        ("decoder.layers.*.self_attention.q_layernorm.weight", 1),
        ("decoder.layers.*.self_attention.linear_proj.weight", 2),
        ("decoder.layers.*.self_attention.linear_proj.bias", 1),
        ("decoder.layers.*.mlp.linear_fc2.post_layernorm.weight", 1),
        ("decoder.layers.*.mlp.router.weight", 1),
        ("decoder.layers.*.mlp.experts.experts.*.linear_fc1.weight", 2),
    ],
)
def test_tensor_parallelism_splits_linears_and_embeddings(name: str, shards: int) -> None:
    assert tensor_parallel_shards(name, 2) == shards


def test_bytes_of_weights_gradients_and_optimizer_state() -> None:
    (stage,) = estimated(run(), processes=4).stages
    n = stage.parameters
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * n, 4 * n, 12 * n // 4)
    (whole,) = estimated(run(distributed_optimizer=False), processes=4).stages
    assert whole.optimizer == 12 * n
    single = run()
    single.train.precision = "float32"
    (stage,) = estimated(single, processes=4).stages
    assert (stage.weights, stage.gradients, stage.optimizer) == (4 * n, 4 * n, 8 * n // 4)


def test_states_of_experts_are_split_over_the_ranks_that_hold_the_same_experts() -> None:
    config = run("olmoe-tiny", ep=2)
    (stage,) = estimated(config, processes=4).stages
    experts = 2 * 8 * 3 * 96 * 128 // 2
    assert stage.optimizer == 12 * (stage.parameters - experts) // 4 + 12 * experts // 2


def test_activations_of_a_layer() -> None:
    # By hand, for a token of a post-norm layer in bfloat16: four hidden states; q, k, v and the
    # output of attention; gate, up and their product; input and output of the QK norm in float32.
    a_token = 2 * 4 * 128 + 2 * (128 + 2 * 64 + 128) + 2 * 3 * 384 + 8 * (128 + 64)
    (stage,) = estimated(run()).stages
    assert stage.activations == 2 * 64 * (LAYERS * a_token + 2 * 2 * 128)
    assert stage.logits == 2 * 64 * VOCABULARY * (2 + 4 + 4)


def test_sequence_parallelism_splits_what_tensor_parallelism_leaves_whole() -> None:
    whole, half = estimated(run()).stages[0], estimated(run(tp=2, sp=True)).stages[0]
    assert half.activations * 2 == whole.activations
    without = estimated(run(tp=2)).stages[0]
    assert half.activations < without.activations < whole.activations
    assert half.logits * 2 == whole.logits


def test_full_recomputation_keeps_each_layers_input() -> None:
    kept = estimated(run(recompute="full")).stages[0].activations
    layer = (estimated(run()).stages[0].activations - 2 * 64 * 2 * 2 * 128) // LAYERS
    assert kept == LAYERS * 2 * 64 * 2 * 128 + layer + 2 * 64 * 2 * 2 * 128
    assert estimated(run(recompute="selective")) == estimated(run())


def of_each_stage(name: str, found: Estimate) -> list[Any]:
    return [getattr(stage, name) for stage in found.stages]


def test_earlier_stages_keep_more_micro_batches() -> None:
    found = estimated(run(pp=4))
    assert of_each_stage("layers", found) == [1, 1, 1, 1]
    first, second, third, last = of_each_stage("activations", found)
    ends = 2 * 64 * 2 * 2 * 128
    assert (first, second, third) == (4 * (last - ends), 3 * (last - ends), 2 * (last - ends))
    assert of_each_stage("logits", found)[:3] == [0, 0, 0]
    assert found.worst is found.stages[0]


def test_a_stage_keeps_no_more_micro_batches_than_a_step_has() -> None:
    config = run(pp=4)
    config.train.global_batch_size = 4
    first, second, third, _ = of_each_stage("activations", estimated(config))
    assert first == second == third


def test_interleaved_chunks_keep_more() -> None:
    """Korthikanti et al. 2022: 1 + (p - 1) / (p m) times as much on the first stage."""
    plain, interleaved = (estimated(run(pp=2, vpp=v)).stages[0].activations for v in (None, 2))
    assert interleaved == plain * (1 + 1 / 4)


def test_stages_of_unequal_depth() -> None:
    uneven = run(provider={"num_layers_in_first_pipeline_stage": 1}, pp=2)
    assert of_each_stage("layers", estimated(uneven)) == [1, 3]
    with pytest.raises(UnsupportedError, match="pipeline_model_parallel_layout"):
        estimated(run(provider={"pipeline_model_parallel_layout": "Et*3|tL"}, pp=2))


def test_the_total_is_the_sum_of_the_gpu_memory() -> None:
    for stage in estimated(run(tp=2, pp=2, sp=True)).stages:
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.logits)
        assert stage.total == math.fsum(parts)


# ----------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    ("precision", "processes", "parallel", "fully_reshardable", "before_the_last", "last"),
    [  # bytes for each of the P parameters that a rank holds
        ("bfloat16", 4, {}, "last", 2 + 12 / 4, 24 + 12 / 4),
        ("bfloat16", 8, {}, "last", 2 + 12 / 8, 24 + 2),
        ("bfloat16", 4, {}, "all", 24 + 12 / 4, 24 + 12 / 4),
        ("bfloat16", 4, {}, "none", 2 + 12 / 4, 2 + 12 / 4),
        ("float32", 4, {}, "last", 4 + 12 / 4, 24 + 4),
        ("bfloat16", 4, {"distributed_optimizer": False}, "last", 14, 14),
        ("float32", 4, {"distributed_optimizer": False}, "last", 12, 12),
        ("bfloat16", 4, {"tp": 2}, "last", 2 + 12 / 2, 24 + 12 / 2),
    ],
)
def test_host_memory_of_saving(
    precision: str,
    processes: int,
    parallel: dict[str, Any],
    fully_reshardable: str,
    before_the_last: float,
    last: float,
) -> None:
    """At DP 4 ``benchmarks/saving.py`` measures 27 bytes a parameter: 24 to gather the state, and
    the rank's own part."""
    config = run(**parallel)
    config.train.precision = precision
    config.checkpoint.fully_reshardable = fully_reshardable
    stage = estimated(config, processes).stages[0]
    assert stage.save == pytest.approx(before_the_last * stage.parameters)
    assert stage.last_save == pytest.approx(last * stage.parameters)
