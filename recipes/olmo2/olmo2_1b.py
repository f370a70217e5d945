"""OLMo-2 1B (OLMo-2-0425-1B): 4T tokens of web text, then 50B of higher-quality text.

The layout is plain data parallelism, on any number of GPUs of 80 GB; on smaller ones
``train.micro_batch_size=1``. Stage 2 was run with the seeds 42, 42069 and 666, and one was kept.
"""

from __future__ import annotations

from megatron_olmo_bridge.recipes.olmo2.olmo2_common import CONTINUED, of_yaml, olmo2
from megatron_olmo_bridge.training.config import (
    ParallelConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)

REPOSITORY = "allenai/OLMo-2-0425-1B"
STAGE1 = "official-0425/OLMo2-1B-stage1.yaml"
STAGE2 = "official-0425/OLMo2-1B-stage2-seed42.yaml"


def stage1() -> TrainingConfig:
    return olmo2(
        "olmo2-1b",
        name="olmo2-1b-stage1",
        lr=4e-4,
        train=StepsConfig(
            steps=1_907_359, global_batch_size=512, micro_batch_size=4, sequence_length=4096,
            precision="bfloat16", seed=6198,
        ),
        schedule=ScheduleConfig(
            warmup_steps=4000, decay="cosine", min_lr_ratio=0.1, end_step=2_384_186
        ),
        parallel=ParallelConfig(overlap=True),
        sources=of_yaml(STAGE1, REPOSITORY, "stage1-step1907359-tokens4001B"),
    )  # fmt: skip


def stage2() -> TrainingConfig:
    return olmo2(
        "olmo2-1b",
        name="olmo2-1b-stage2",
        lr=7.4487e-5,
        train=StepsConfig(
            steps=23_852, global_batch_size=512, micro_batch_size=4, sequence_length=4096,
            precision="bfloat16", seed=42,
        ),
        schedule=ScheduleConfig(warmup_steps=0, decay="linear", min_lr_ratio=0.0, end_step=23_842),
        parallel=ParallelConfig(overlap=True),
        init=CONTINUED,
        sources=of_yaml(STAGE2, REPOSITORY, "stage2-ingredient3-step23852-tokens51B") | {
            "init.optimizer": "allenai/OLMo TrainConfig: reset_optimizer_state, false by default",
        },
    )  # fmt: skip


config = stage1
