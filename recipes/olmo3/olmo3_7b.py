"""Olmo-3 7B (Olmo-3-1025-7B): 2.5T tokens of stage 1, and mid-training over 100B.

Stage 1 was begun on a cosine over 5T tokens. Half way down it, at step 597046, the rest was
stretched to end at 7T tokens (``OLMo-3-1025-7B-pretrain-2.py``); training stopped at step 1413814,
after 5.93T. That second part is not a recipe here: no schedule of this package is half a cosine.

Mid-training (``stage2``) began at that step, with its optimizer. It was run twice, and the two were
averaged. Its learning rate is that of the 5T cosine after 2T tokens.

Not known: whether the step count of SkipStepAdamW advanced, which it does by default since version
2.2.0 of OLMo-core, but not with ``step_increment_bugfix=False``. Training checkpoints tell: without
it their ``step`` is 0, and ``optimizer.bias_correction=first_step`` trains so.

The layout fits one node of 8 GPUs of 80 GB, or any number of such nodes.
"""

from __future__ import annotations

from typing import Any

from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    InitConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    StabilityConfig,
    StepsConfig,
    TrainingConfig,
)

REPOSITORY = "allenai/Olmo-3-1025-7B"
PRETRAINING = "allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-7B-pretrain-1.py"
MIDTRAINING = "allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-7B-midtrain.py"


def stage1() -> TrainingConfig:
    return _olmo3(
        name="olmo3-7b-stage1",
        lr=3e-4,
        train=StepsConfig(
            steps=597_046, global_batch_size=512, micro_batch_size=1, sequence_length=8192,
            precision="bfloat16", seed=34521,
        ),
        schedule=ScheduleConfig(
            warmup_steps=2000, decay="cosine", min_lr_ratio=0.1, end_step=1_192_093
        ),
        evaluation=EvaluationConfig(interval=10_000),
        sources=_sources(PRETRAINING, "CosWithWarmup") | {
            "train.steps": f"{PRETRAINING}: hard_stop",
            "schedule.min_lr_ratio": f"{PRETRAINING}: CosWithWarmup.alpha_f, by default",
            "evaluation.interval": f"{PRETRAINING}: eval_interval",
        },
    )  # fmt: skip


def stage2() -> TrainingConfig:
    return _olmo3(
        name="olmo3-7b-stage2",
        lr=2.0712352850360292e-4,
        train=StepsConfig(
            steps=47_684, global_batch_size=256, micro_batch_size=1, sequence_length=8192,
            precision="bfloat16", seed=1337,
        ),
        schedule=ScheduleConfig(warmup_steps=0, decay="linear", min_lr_ratio=0.0, end_step=47_684),
        evaluation=EvaluationConfig(interval=1000),
        init=InitConfig(optimizer=True),
        sources=_sources(MIDTRAINING, "LinearWithWarmup") | {
            "train.steps": f"{REPOSITORY}: revision stage2-step47684",
            "train.seed": f"{MIDTRAINING}: SEED",
            "schedule.warmup_steps": f"{MIDTRAINING}: LinearWithWarmup.warmup",
            "schedule.min_lr_ratio": f"{MIDTRAINING}: LinearWithWarmup.alpha_f",
            "init.optimizer": f"{MIDTRAINING}: load_optim_state",
            "evaluation.interval": "ours",
        },
    )  # fmt: skip


def _olmo3(lr: float, **sections: Any) -> TrainingConfig:
    """Return a run of Olmo-3 7B, with what both stages share."""
    return TrainingConfig(
        model=dict(published_sizes()["olmo3-7b"].sizes["olmo3-7b"]),
        provider={
            "init_method_std": 0.02, "init_truncation": 3.0, "make_vocab_size_divisible_by": 128,
        },
        optimizer=OptimizerConfig(
            lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            decayed="all_but_embeddings", clip_grad=1.0, z_loss=1e-5,
        ),
        stability=StabilityConfig(on_spike="skip", sigma=6.0, window=128),
        parallel=ParallelConfig(tp=2, sp=True, overlap=True),
        checkpoint=CheckpointConfig(interval=1000, asynchronous=True),
        **sections,
    )  # fmt: skip


def _sources(script: str, schedule: str) -> dict[str, str]:
    """Return the source of each value in OLMo-core; ``schedule`` is its scheduler's class."""
    optim = f"{script}: SkipStepAdamWConfig"
    return {
        "model": f"{REPOSITORY}: config.json",
        "provider.init_method_std": f"{script}: TransformerConfig.init_std, by default",
        "provider.init_truncation": "OLMo-core's InitMethod.normal: 3 standard deviations",
        "provider.make_vocab_size_divisible_by": f"{script}: padded_vocab_size()",
        "train.global_batch_size": f"{script}: GLOBAL_BATCH_SIZE, in tokens",
        "train.micro_batch_size": "ours: fits 80 GB",
        "train.sequence_length": f"{script}: DEFAULT_SEQUENCE_LENGTH",
        "train.precision": f"{script}: dp_config.param_dtype",
        "train.seed": f"{script}: data_loader.seed",
        "optimizer.lr": f"{script}: LR",
        "optimizer.beta1": f"{optim}.betas",
        "optimizer.beta2": f"{optim}.betas",
        "optimizer.eps": f"{optim}.eps, by default",
        "optimizer.weight_decay": f"{optim}.weight_decay",
        "optimizer.decayed": f"{optim}.group_overrides",
        "optimizer.clip_grad": f"{script}: max_grad_norm",
        "optimizer.z_loss": f"{script}: z_loss_multiplier",
        "schedule.warmup_steps": f"{script}: {schedule}.warmup_steps",
        "schedule.decay": f"{script}: {schedule}",
        "schedule.end_step": f"{script}: max_duration, in tokens, rounded up",
        "stability.on_spike": optim,
        "stability.sigma": f"{optim}.sigma_factor, by default",
        "stability.window": f"{optim}.rolling_interval_length, by default",
        "parallel": "ours: fits 80 GB; OLMo was trained with FSDP",
        "checkpoint.interval": f"{script}: CheckpointerCallback.save_interval",
        "checkpoint.asynchronous": "ours",
    }


config = stage1
