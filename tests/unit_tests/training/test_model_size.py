"""Parameters and FLOPs of a model, against numbers that were worked out by hand."""

from __future__ import annotations

from typing import Any

from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import as_classifier, bridge_for
from megatron_olmo_bridge.models.families import published_sizes as sizes
from megatron_olmo_bridge.training.model_size import flops_per_token, parameter_count

LAYERS, HIDDEN, FFN, VOCABULARY = 4, 128, 384, 1024
"""Sizes of olmo2-tiny, which has 8 heads and 4 key/value heads of 16."""


def model(size: str = "olmo2-tiny") -> dict[str, Any]:
    return dict(sizes()[size].sizes[size])


def bridge(size: str = "olmo2-tiny") -> ModelBridge:
    return bridge_for(model(size), size)


def test_parameters() -> None:
    assert parameter_count(bridge("olmo2-7b")) == 7_298_617_344
    assert parameter_count(bridge()) == parameter_count(bridge(), active_only=True) == 1_050_496
    assert parameter_count(bridge(), embeddings=False) == 1_050_496 - VOCABULARY * HIDDEN


def test_only_the_experts_that_a_token_is_routed_to_are_active() -> None:
    experts = bridge("olmoe-tiny")  # 3 of 8 experts of 96, in 2 layers
    inactive = parameter_count(experts) - parameter_count(experts, active_only=True)
    assert inactive == 2 * 5 * 3 * 96 * 128


def test_flops_of_a_dense_model() -> None:
    attention = (8 + 2 * 4 + 8) * 16 * HIDDEN  # q, k and v, and the output projection
    matrices = LAYERS * (attention + 3 * HIDDEN * FFN) + VOCABULARY * HIDDEN
    keys = 4 * 8 * 16 * 64 / 2  # half of the sequence, for each layer and head
    assert flops_per_token(bridge(), 64) == 6 * matrices + 12 * keys


def test_flops_of_windows() -> None:
    tiny = bridge("olmo3-tiny")  # windows of 16 tokens in 3 of 4 layers
    shorter, longer = flops_per_token(tiny, 16), flops_per_token(tiny, 64)
    visible_keys = 3 * 16 * (1 - 16 / 128) + 32
    assert longer - shorter == 12 * 128 * (visible_keys - 4 * 8)


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
