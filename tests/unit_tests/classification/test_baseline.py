"""The baseline learns, its best state is kept, and transformers serves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import pipeline

from megatron_olmo_bridge.classification.baseline import class_weights, train_baseline
from megatron_olmo_bridge.classification.data import Examples, balanced_weights
from megatron_olmo_bridge.classification.hf import HFClassifier
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.problem_types import SINGLE_LABEL
from megatron_olmo_bridge.nn.sequence_loss import sequence_losses
from megatron_olmo_bridge.training.config import (
    ClassificationConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)


def config(encoder: Path | str, steps: int = 40, **fields: object) -> TrainingConfig:
    return TrainingConfig(
        train=StepsConfig(
            steps=steps, global_batch_size=16, micro_batch_size=8, sequence_length=12,
            precision="float32",
        ),
        optimizer=OptimizerConfig(lr=1e-9),
        schedule=ScheduleConfig(warmup_steps=2),
        evaluation=EvaluationConfig(interval=10),
        classification=ClassificationConfig(baseline=str(encoder), **fields),  # type: ignore[arg-type]
    )  # fmt: skip


def run(settings: TrainingConfig, train: Examples, held_out: Examples, folder: Path) -> list[str]:
    lines: list[str] = []
    train_baseline(settings, train, held_out, folder, lines.append)
    return lines


@pytest.mark.slow
def test_it_learns_and_is_served(
    encoder: Path, train_examples: Examples, held_out_examples: Examples, tmp_path: Path
) -> None:
    settings = config(encoder, steps=120, baseline_lr=1e-2, class_weights="balanced")
    settings.evaluation.interval = 40
    lines = run(settings, train_examples, held_out_examples, tmp_path / "a")
    assert [line.partition(":")[0] for line in lines] == [
        f">> baseline at step {step}" for step in (40, 80, 120)
    ]
    found = HFClassifier.load(tmp_path / "a", 12).outputs(held_out_examples.texts).argmax(-1)
    assert (found == torch.from_numpy(held_out_examples.labels)).float().mean() >= 0.9
    serve = pipeline("text-classification", model=str(tmp_path / "a"))
    assert serve("noise1 third noise2")[0]["label"] == "third"

    again = run(settings, train_examples, held_out_examples, tmp_path / "b")
    assert again == lines, "the same seed gives the same training"


def test_without_progress_it_stops_and_keeps_the_first_state(
    encoder: Path, train_examples: Examples, held_out_examples: Examples, tmp_path: Path
) -> None:
    """At a learning rate of almost nothing, no evaluation is better than the first."""
    lines = run(config(encoder, patience=2), train_examples, held_out_examples, tmp_path / "a")
    assert len(lines) == 3  # at step 10, and two that were no better
    assert json.loads((tmp_path / "a/config.json").read_text())["id2label"] == {
        "0": "first", "1": "second", "2": "third"
    }  # fmt: skip


def test_losses_are_weighted_and_do_not_depend_on_how_a_batch_is_cut() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    weights = torch.from_numpy(balanced_weights(labels.numpy(), 3))
    whole = sequence_losses(logits, labels, SINGLE_LABEL, weights)
    parts = [
        sequence_losses(logits[i], labels[i], SINGLE_LABEL, weights)
        for i in (slice(4), slice(4, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    # Over data that the weights were made from, this is the usual weighted mean.
    assert whole.mean() == pytest.approx(cross_entropy(logits, labels, weight=weights).item())


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_only_single_labels_can_be_balanced(problem_type: str, train_examples: Examples) -> None:
    task = ClassificationConfig(problem_type=problem_type, class_weights="balanced")
    with pytest.raises(InputError, match=f"problem_type is {problem_type}: set class_weights"):
        class_weights(task, train_examples)


def test_what_cannot_be_loaded(
    tmp_path: Path, train_examples: Examples, held_out_examples: Examples
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: transformers can't load it"):
        run(config(tmp_path / "empty"), train_examples, held_out_examples, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_longer_texts_are_cut_at_the_models_own_limit(encoder: Path) -> None:
    classifier = HFClassifier.load(encoder, 512, classes=("a", "b"))
    assert classifier.length == 16
    assert classifier.logits(["noise1 " * 100, "noise2"]).shape == (2, 2)
