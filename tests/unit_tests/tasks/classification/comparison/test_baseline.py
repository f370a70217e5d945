"""The baseline learns, its best state is kept, and transformers serves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparison.baseline import train_baseline
from comparison.hf import HFClassifier
from transformers import pipeline

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.tasks.classification.data import Examples
from megatron_olmo_bridge.training.config import (
    ClassificationConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)


def config(steps: int = 40, **fields: object) -> TrainingConfig:
    return TrainingConfig(
        train=StepsConfig(
            steps=steps,
            global_batch_size=16,
            micro_batch_size=8,
            sequence_length=12,
            precision="float32",
        ),
        optimizer=OptimizerConfig(lr=1e-9),
        schedule=ScheduleConfig(warmup_steps=2),
        evaluation=EvaluationConfig(interval=10),
        classification=ClassificationConfig(**fields),  # type: ignore[arg-type]
    )


def run(
    encoder: Path,
    settings: TrainingConfig,
    train: Examples,
    held_out: Examples,
    folder: Path,
    lr: float | None = None,
) -> list[str]:
    lines: list[str] = []
    train_baseline(str(encoder), lr, settings, (train, held_out), folder, lines.append)
    return lines


@pytest.mark.slow
def test_it_learns_and_is_served(
    encoder: Path, train_examples: Examples, held_out_examples: Examples, tmp_path: Path
) -> None:
    settings = config(steps=120, class_weights="balanced")
    settings.evaluation.interval = 40
    lines = run(encoder, settings, train_examples, held_out_examples, tmp_path / "a", lr=1e-2)
    assert [line.partition(":")[0] for line in lines] == [
        f">> baseline at step {step}" for step in (40, 80, 120)
    ]
    found = HFClassifier.load(tmp_path / "a", 12).outputs(held_out_examples.texts).argmax(-1)
    assert (found == torch.from_numpy(held_out_examples.labels)).float().mean() >= 0.9
    serve = pipeline("text-classification", model=str(tmp_path / "a"))
    assert serve("noise1 third noise2")[0]["label"] == "third"

    again = run(encoder, settings, train_examples, held_out_examples, tmp_path / "b", lr=1e-2)
    assert again == lines, "the same seed gives the same training"


def test_without_progress_it_stops_and_keeps_the_first_state(
    encoder: Path, train_examples: Examples, held_out_examples: Examples, tmp_path: Path
) -> None:
    """At a learning rate of almost nothing, no evaluation is better than the first."""
    lines = run(encoder, config(patience=2), train_examples, held_out_examples, tmp_path / "a")
    assert len(lines) == 3  # at step 10, and two that were no better
    assert json.loads((tmp_path / "a/config.json").read_text())["id2label"] == {
        "0": "first",
        "1": "second",
        "2": "third",
    }


def test_what_cannot_be_loaded(
    tmp_path: Path, train_examples: Examples, held_out_examples: Examples
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: transformers can't load it"):
        run(tmp_path / "empty", config(), train_examples, held_out_examples, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_longer_texts_are_cut_at_the_models_own_limit(encoder: Path) -> None:
    classifier = HFClassifier.load(encoder, 512, classes=("a", "b"))
    assert classifier.length == 16
    assert classifier.logits(["noise1 " * 100, "noise2"]).shape == (2, 2)
