"""OLMo-2 13B (OLMo-2-1124-13B): 5T tokens of web text, then 100B or 300B of higher-quality text.

``OLMo2-13B-stage1.yaml`` has a peak learning rate of 3e-4, which the launch scripts override with
9e-4. They leave the warmup as it is there: 8,388,608,000 tokens are 1000 steps. (Table 3 of the
paper, arXiv 2501.00656, has the rate of the scripts and 2000 steps, which are those of 7B.)

The layout fits one node of 8 GPUs of 80 GB, or any number of such nodes; from 8 nodes on,
``parallel.tp=2`` fits as well. Stage 2 was run with the seeds 1110, 2662 and 6209 over 100B tokens
and with 2662 over 300B, and the four were averaged.
"""

from __future__ import annotations

from megatron_olmo_bridge.recipes.olmo2.olmo2_common import CONTINUED, of_yaml, olmo2
from megatron_olmo_bridge.training.config import (
    ParallelConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)

REPOSITORY = "allenai/OLMo-2-1124-13B"
STAGE1 = "official-1124/OLMo2-13B-stage1.yaml"
STAGE2 = "official-1124/OLMo2-13B-stage2-seed1110-100B.yaml"
LAUNCHED = "scripts/augusta/peteish13.sh, scripts/beaker/peteish/peteish13-highlr.sh"


def stage1() -> TrainingConfig:
    return olmo2(
        "olmo2-13b",
        name="olmo2-13b-stage1",
        lr=9e-4,
        train=StepsConfig(
            steps=596_057, global_batch_size=2048, micro_batch_size=1, sequence_length=4096,
            precision="bfloat16", seed=6198,
        ),
        schedule=ScheduleConfig(
            warmup_steps=1000, decay="cosine", min_lr_ratio=0.1, end_step=596_047
        ),
        parallel=ParallelConfig(tp=4, sp=True, overlap=True),
        sources=of_yaml(STAGE1, REPOSITORY, "stage1-step596057-tokens5001B") | {
            "optimizer.lr": f"allenai/OLMo {LAUNCHED}: --optimizer.learning_rate",
        },
    )  # fmt: skip


def stage2() -> TrainingConfig:
    return olmo2(
        "olmo2-13b",
        name="olmo2-13b-stage2",
        lr=9e-5,
        train=StepsConfig(
            steps=11_931, global_batch_size=2048, micro_batch_size=1, sequence_length=4096,
            precision="bfloat16", seed=1110,
        ),
        schedule=ScheduleConfig(warmup_steps=0, decay="linear", min_lr_ratio=0.0, end_step=11_921),
        parallel=ParallelConfig(tp=4, sp=True, overlap=True),
        init=CONTINUED,
        sources=of_yaml(STAGE2, REPOSITORY, "stage2-ingredient1-step11931-tokens100B") | {
            "init.optimizer": "allenai/OLMo TrainConfig: reset_optimizer_state, false by default",
        },
    )  # fmt: skip


def stage2_300b() -> TrainingConfig:
    longer = "OLMo2-13B-stage2-seed2662-300B.yaml"
    run = stage2()
    run.name = "olmo2-13b-stage2-300b"
    run.train.steps, run.schedule.end_step, run.train.seed = 35_773, 35_763, 2662
    revision = "stage2-ingredient4-step35773-tokens300B"
    run.sources |= of_yaml(f"official-1124/{longer}", REPOSITORY, revision)
    return run


config = stage1
