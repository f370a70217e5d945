"""The classifier's recipes, against their source, written down from it."""

from __future__ import annotations

import pytest

from megatron_olmo_bridge.training.recipes import apply_overrides, load_recipe

RECIPE = "complaints"


def test_complaints_are_learned_as_olmo2_1b_was_fine_tuned() -> None:
    """open-instruct, docs/olmo2.md: 8 GPUs x 2 sequences x 8 accumulated; linear, 3 % warm-up."""
    config = load_recipe(RECIPE)
    assert config.init.hf == "allenai/OLMo-2-0425-1B"
    assert config.optimizer.lr == 3e-5
    assert config.optimizer.weight_decay == 0
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.999)
    assert config.train.global_batch_size == 8 * 2 * 8
    assert (config.schedule.decay, config.schedule.min_lr_ratio) == ("linear", 0)
    assert config.schedule.warmup_steps == 0.03 * config.train.steps
    assert config.train.precision == "bfloat16"
    task = config.classification
    assert task is not None
    assert task.class_weights == "balanced"


@pytest.mark.parametrize("name", [RECIPE, f"{RECIPE}:tiny"])
def test_what_a_recipe_leaves_open_can_be_set(name: str) -> None:
    config = apply_overrides(
        load_recipe(name),
        ["classification.train=a.csv", "classification.text=body", "classification.patience=null"],
    )
    assert config.classification is not None
    assert (config.classification.train, config.classification.text) == ("a.csv", "body")
    assert config.classification.patience is None
