"""The arithmetic of what a run takes, against numbers that were worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import as_classifier, bridge_for
from megatron_olmo_bridge.models.families import published_sizes as sizes
from megatron_olmo_bridge.training.config import ParallelConfig, StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.estimate import (
    Estimate,
    estimate,
    flops_per_token,
    parameter_count,
    shards,
)
from megatron_olmo_bridge.training.layout import Layout, minimum_processes
from megatron_olmo_bridge.training.resolve import bridge_of

LAYERS, HIDDEN, FFN, VOCABULARY = 4, 128, 384, 1024
"""Of olmo2-tiny, with 8 heads and 4 key/value heads of 16."""


def model(size: str = "olmo2-tiny") -> dict[str, Any]:
    return dict(sizes()[size].sizes[size])


def bridge(size: str = "olmo2-tiny") -> ModelBridge:
    return bridge_for(model(size), size)


def run(size: str = "olmo2-tiny", provider: dict[str, Any] | None = None, **parallel: Any) -> Any:
    return TrainingConfig(
        model=model(size),
        provider=provider or {},
        train=StepsConfig(steps=10, global_batch_size=32, micro_batch_size=2, sequence_length=64),
        parallel=ParallelConfig(**parallel),
    )


def estimated(config: TrainingConfig, processes: int | None = None) -> Estimate:
    """The estimate of a run, by default on the fewest processes."""
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


def test_parameters() -> None:
    assert parameter_count(bridge("olmo2-7b")) == 7_298_617_344
    found = estimated(run())
    assert found.parameters == found.active_parameters == 1_050_496
    assert found.parameters_without_embeddings == 1_050_496 - VOCABULARY * HIDDEN


def test_a_token_meets_only_its_experts() -> None:
    found = estimated(run("olmoe-tiny"))  # 3 of 8 experts of 96, in 2 layers
    assert found.parameters - found.active_parameters == 2 * 5 * 3 * 96 * 128


def test_padding_counts_on_the_rank_and_not_in_the_model() -> None:
    plain = estimated(run("gpt2-124m"))
    padded = estimated(run("gpt2-124m", {"make_vocab_size_divisible_by": 128}))
    assert (plain.padded_vocab_size, padded.padded_vocab_size) == (50257, 50304)
    assert plain.parameters == padded.parameters == plain.stages[0].parameters
    assert padded.stages[0].parameters - plain.stages[0].parameters == 47 * 768
    assert estimated(run("gpt2-124m", tp=2)).padded_vocab_size == 50258


# ------------------------------------------------------------------------------------------ FLOPs


def test_flops_of_a_dense_model() -> None:
    attention = (8 + 2 * 4 + 8) * 16 * HIDDEN  # q, k and v, and the output projection
    matrices = LAYERS * (attention + 3 * HIDDEN * FFN) + VOCABULARY * HIDDEN
    keys = 4 * 8 * 16 * 64 / 2  # of each layer and head, half of the sequence
    assert flops_per_token(bridge(), 64) == 6 * matrices + 12 * keys


def test_flops_of_published_sizes_are_near_six_per_parameter() -> None:
    for size in ("olmo2-1b", "olmo2-7b", "olmo2-13b", "olmo2-32b"):
        found = estimated(run(size))
        assert 1.0 < found.flops_per_token / (6 * found.parameters_without_embeddings) < 1.02
        assert found.flops == found.flops_per_token * found.tokens


def test_flops_of_windows() -> None:
    tiny = bridge("olmo3-tiny")  # windows of 16 tokens in 3 of 4 layers
    shorter, longer = flops_per_token(tiny, 16), flops_per_token(tiny, 64)
    seen = 3 * 16 * (1 - 16 / 128) + 32
    assert longer - shorter == 12 * 128 * (seen - 4 * 8)


def test_flops_of_experts_and_of_a_tied_output_layer() -> None:
    experts = bridge("olmoe-tiny")
    attention = (8 + 2 * 4 + 8) * 16 * 128
    matrices = 2 * (attention + 8 * 128 + 3 * 3 * 96 * 128) + 1024 * 128
    assert flops_per_token(experts, 64) == 6 * matrices + 12 * 2 * 128 * 32
    gpt2 = bridge("gpt2-124m")
    matrices = 12 * 12 * 768 * 768 + 50257 * 768
    assert flops_per_token(gpt2, 1024) == 6 * matrices + 12 * 12 * 768 * 512


def test_a_classifier_has_no_output_layer() -> None:
    tied = model() | {"tie_word_embeddings": True}
    for config in (model(), tied):
        head = bridge_for(as_classifier(config, 7), "")
        expected = flops_per_token(bridge(), 64) - 6 * (VOCABULARY - 7) * HIDDEN
        assert flops_per_token(head, 64) == expected


def test_gpu_days() -> None:
    found = estimated(
        replace(run("olmo2-7b"), train=StepsConfig(steps=928_646, global_batch_size=1024))
    )
    assert found.gpu_days == pytest.approx(found.flops / 989e12 / 0.4 / 86400)
    assert 5000 < found.gpu_days < 5200


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("name", "parts"),
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
def test_what_tensor_parallelism_cuts(name: str, parts: int) -> None:
    assert shards(name, 2) == parts


def test_bytes_of_the_states() -> None:
    (stage,) = estimated(run(), processes=4).stages
    n = stage.parameters
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * n, 4 * n, 12 * n // 4)
    (whole,) = estimated(run(distributed_optimizer=False), processes=4).stages
    assert whole.optimizer == 12 * n
    single = run()
    single.train.precision = "float32"
    (stage,) = estimated(single, processes=4).stages
    assert (stage.weights, stage.gradients, stage.optimizer) == (4 * n, 4 * n, 8 * n // 4)


def test_experts_states_are_shared_out_over_ranks_with_the_same_experts() -> None:
    config = run("olmoe-tiny", ep=2)
    (stage,) = estimated(config, processes=4).stages
    experts = 2 * 8 * 3 * 96 * 128 // 2
    assert stage.optimizer == 12 * (stage.parameters - experts) // 4 + 12 * experts // 2


def test_activations_of_a_layer() -> None:
    # By hand, for a token of a post-norm layer in bfloat16: four hidden states; q, k, v and what
    # attention gives; gate, up and their product; input and result of the QK norm in float32.
    a_token = 2 * 4 * 128 + 2 * (128 + 2 * 64 + 128) + 2 * 3 * 384 + 8 * (128 + 64)
    (stage,) = estimated(run()).stages
    assert stage.activations == 2 * 64 * (LAYERS * a_token + 2 * 2 * 128)
    assert stage.logits == 2 * 64 * VOCABULARY * (2 + 4 + 4)


def test_sequence_parallelism_shares_out_the_rest() -> None:
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


def test_no_more_micro_batches_than_there_are() -> None:
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


def test_all_parts_are_in_the_total() -> None:
    for stage in estimated(run(tp=2, pp=2, sp=True)).stages:
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.logits)
        assert stage.total == math.fsum(parts)


# ----------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    ("precision", "processes", "parallel", "wanted", "on_the_way", "last"),
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
    wanted: str,
    on_the_way: float,
    last: float,
) -> None:
    """24 bytes a parameter to gather the state were 27 at DP 4, as ``benchmarks/saving.py`` says,
    with the rank's own part."""
    config = run(**parallel)
    config.train.precision = precision
    config.checkpoint.fully_reshardable = wanted
    stage = estimated(config, processes).stages[0]
    assert stage.save == pytest.approx(on_the_way * stage.parameters)
    assert stage.last_save == pytest.approx(last * stage.parameters)
