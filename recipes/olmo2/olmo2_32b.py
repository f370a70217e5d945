"""OLMo-2 32B (OLMo-2-0325-32B): 6.06T tokens of web text, then 100B or 300B of higher-quality text.

The layout takes 2 nodes of 8 GPUs of 80 GB, or a multiple; 8 nodes leave half of the memory free.
Where nodes are joined by slow links, ``parallel.pp=2 parallel.vpp=4`` sends less between them.
Stage 2 was run with the seeds 1110 and 2662 over 100B tokens and with 2662 over 300B
(``stage2_300b``), and the three were averaged.

Known: before version 2.2.0 (August 2025), the step count of OLMo-core's SkipStepAdamW did not
advance, so that its bias correction stayed that of the first step; updates were sqrt(1 - beta2) /
(1 - beta1) = 2.236 times larger than those of AdamW. Inferred: this model, of March 2025, was
trained so. Its training checkpoints tell: their ``step`` is 0, and a run that continues from one
trains so too. A run from the start does with ``optimizer.bias_correction=first_step``.
"""

from __future__ import annotations

from megatron_olmo_bridge.recipes.olmo2.olmo2_common import CONTINUED, of_script, olmo2
from megatron_olmo_bridge.training.config import (
    ParallelConfig,
    ScheduleConfig,
    StabilityConfig,
    StepsConfig,
    TrainingConfig,
)

REPOSITORY = "allenai/OLMo-2-0325-32B"
STAGE1 = "OLMo2/OLMo-2-0325-32B-train.py"
STAGE2 = "OLMo2/OLMo-2-0325-32B-anneal.py"


def stage1() -> TrainingConfig:
    return olmo2(
        "olmo2-32b",
        name="olmo2-32b-stage1",
        lr=6e-4,
        train=StepsConfig(
            steps=721_901, global_batch_size=2048, micro_batch_size=1, sequence_length=4096,
            precision="bfloat16", seed=34521,
        ),
        schedule=ScheduleConfig(
            warmup_steps=2000, decay="cosine", min_lr_ratio=0.1, end_step=774_861
        ),
        stability=StabilityConfig(on_spike="skip", sigma=6.0, window=128),
        parallel=ParallelConfig(tp=8, sp=True, overlap=True),
        sources=of_script(STAGE1, REPOSITORY, "stage1-step721901-tokens6056B"),
    )  # fmt: skip


def stage2() -> TrainingConfig:
    return olmo2(
        "olmo2-32b",
        name="olmo2-32b-stage2",
        lr=6.6232e-5,
        train=StepsConfig(
            steps=11_921, global_batch_size=2048, micro_batch_size=1, sequence_length=4096,
            precision="bfloat16", seed=1110,
        ),
        schedule=ScheduleConfig(warmup_steps=0, decay="linear", min_lr_ratio=0.0, end_step=11_921),
        stability=StabilityConfig(on_spike="skip", sigma=6.0, window=128),
        parallel=ParallelConfig(tp=8, sp=True, overlap=True),
        init=CONTINUED,
        sources=of_script(STAGE2, REPOSITORY, "stage2-ingredient1-step11921-tokens101B") | {
            "optimizer.lr": "calculated: stage 1's cosine at its step 721901, where stage 2 begins",
            "train.seed": "allenai/OLMo-core src/scripts/official/OLMo2/README.md: stage 2",
            "init.optimizer": "allenai/OLMo-core Trainer: load_optim_state, true by default",
        },
    )  # fmt: skip


def stage2_300b() -> TrainingConfig:
    run = stage2()
    run.name = "olmo2-32b-stage2-300b"
    run.train.steps, run.schedule.end_step, run.train.seed = 35_763, 35_763, 2662
    run.sources["train.steps"] = f"{REPOSITORY}: revision stage2-ingredient3-step35763-tokens301B"
    return run


config = stage1
