"""A tiny OLMo-2 (1M parameters) for a laptop: some minutes on a CPU. All numbers are ours.

Its vocabulary has 1024 tokens: train a tokenizer of at most as many on your text, and prepare the
text with it.
"""

from __future__ import annotations

from megatron_olmo_bridge.recipes.olmo2.olmo2_common import olmo2
from megatron_olmo_bridge.training.config import ScheduleConfig, StepsConfig, TrainingConfig


def config() -> TrainingConfig:
    run = olmo2(
        "olmo2-tiny",
        name="olmo2-tiny",
        lr=1e-3,
        train=StepsConfig(
            steps=300, global_batch_size=16, micro_batch_size=8, sequence_length=128,
            precision="float32",
        ),
        schedule=ScheduleConfig(warmup_steps=30, decay="cosine", min_lr_ratio=0.1),
        sources=dict.fromkeys(
            ("model", "provider", "train", "optimizer", "schedule", "checkpoint", "evaluation"),
            "ours: OLMo-2's way of training, made small",
        ),
    )  # fmt: skip
    run.checkpoint.interval, run.evaluation.interval = 100, 50
    run.checkpoint.asynchronous = False
    return run
