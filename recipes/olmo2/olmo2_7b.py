"""OLMo-2 7B (OLMo-2-1124-7B): 3.9T tokens of web text, then 50B of higher-quality text.

The layout fits one node of 8 GPUs of 80 GB, or any number of such nodes. Stage 2 was
run with the seeds 42, 42069 and 666, and the three were averaged.
"""

from __future__ import annotations

from megatron_olmo_bridge.recipes.olmo2.olmo2_common import CONTINUED, of_yaml, olmo2
from megatron_olmo_bridge.training.config import (
    ParallelConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)

REPOSITORY = "allenai/OLMo-2-1124-7B"
STAGE1 = "official-1124/OLMo2-7B-stage1.yaml"
STAGE2 = "official-1124/OLMo2-7B-stage2-seed42.yaml"


def stage1() -> TrainingConfig:
    return olmo2(
        "olmo2-7b",
        name="olmo2-7b-stage1",
        lr=3e-4,
        train=StepsConfig(
            steps=928_646, global_batch_size=1024, micro_batch_size=2, sequence_length=4096,
            precision="bfloat16", seed=6198,
        ),
        schedule=ScheduleConfig(
            warmup_steps=2000, decay="cosine", min_lr_ratio=0.1, end_step=1_192_093
        ),
        parallel=ParallelConfig(tp=2, sp=True, overlap=True),
        sources=of_yaml(STAGE1, REPOSITORY, "stage1-step928646-tokens3896B"),
    )  # fmt: skip


def stage2() -> TrainingConfig:
    return olmo2(
        "olmo2-7b",
        name="olmo2-7b-stage2",
        lr=6.1499e-5,
        train=StepsConfig(
            steps=11_931, global_batch_size=1024, micro_batch_size=2, sequence_length=4096,
            precision="bfloat16", seed=42,
        ),
        schedule=ScheduleConfig(warmup_steps=0, decay="linear", min_lr_ratio=0.0, end_step=11_921),
        parallel=ParallelConfig(tp=2, sp=True, overlap=True),
        init=CONTINUED,
        sources=of_yaml(STAGE2, REPOSITORY, "stage2-ingredient1-step11931-tokens50B") | {
            "init.optimizer": "allenai/OLMo TrainConfig: reset_optimizer_state, false by default",
        },
    )  # fmt: skip


config = stage1
