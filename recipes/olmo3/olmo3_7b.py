"""Olmo-3 7B (Olmo-3-1025-7B), the first part of stage 1: 2.5T tokens.

Stage 1 was begun on a cosine over 5T tokens. Half way down it, at step 597046, the rest was
stretched to end at 7T tokens (``OLMo-3-1025-7B-pretrain-2.py``); training stopped at step 1413814,
after 5.93T. That second part is not a recipe here: no schedule of this package is half a cosine.

The layout fits one node of 8 GPUs of 80 GB, or any number of such nodes.
"""

from __future__ import annotations

from megatron_olmo_bridge.models.bridge import published_sizes
from megatron_olmo_bridge.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    StabilityConfig,
    TrainConfig,
    TrainingConfig,
)

SCRIPT = "allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-7B-pretrain-1.py"
OPTIM = f"{SCRIPT}: SkipStepAdamWConfig"


def stage1() -> TrainingConfig:
    return TrainingConfig(
        name="olmo3-7b-stage1",
        model=dict(published_sizes()["olmo3-7b"].sizes["olmo3-7b"]),
        provider={
            "init_method_std": 0.02, "init_truncation": 3.0, "make_vocab_size_divisible_by": 128,
        },
        train=TrainConfig(
            steps=597_046, global_batch_size=512, micro_batch_size=1, sequence_length=8192,
            precision="bfloat16", seed=34521,
        ),
        optimizer=OptimizerConfig(
            lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            decayed="all_but_embeddings", clip_grad=1.0, z_loss=1e-5,
        ),
        schedule=ScheduleConfig(
            warmup_steps=2000, decay="cosine", min_lr_ratio=0.1, end_step=1_192_093
        ),
        stability=StabilityConfig(on_spike="skip", sigma=6.0, window=128),
        parallel=ParallelConfig(tp=2, sp=True, overlap=True),
        checkpoint=CheckpointConfig(interval=1000, asynchronous=True),
        evaluation=EvaluationConfig(interval=10_000),
        sources={
            "model": "allenai/Olmo-3-1025-7B: config.json",
            "provider.init_method_std": f"{SCRIPT}: TransformerConfig.init_std, by default",
            "provider.init_truncation": "OLMo-core's InitMethod.normal: 3 standard deviations",
            "provider.make_vocab_size_divisible_by": f"{SCRIPT}: padded_vocab_size()",
            "train.steps": f"{SCRIPT}: hard_stop",
            "train.global_batch_size": f"{SCRIPT}: GLOBAL_BATCH_SIZE, in tokens",
            "train.micro_batch_size": "ours: fits 80 GB",
            "train.sequence_length": f"{SCRIPT}: DEFAULT_SEQUENCE_LENGTH",
            "train.precision": f"{SCRIPT}: dp_config.param_dtype",
            "train.seed": f"{SCRIPT}: data_loader.seed",
            "optimizer.lr": f"{SCRIPT}: LR",
            "optimizer.beta1": f"{OPTIM}.betas",
            "optimizer.beta2": f"{OPTIM}.betas",
            "optimizer.eps": f"{OPTIM}.eps, by default",
            "optimizer.weight_decay": f"{OPTIM}.weight_decay",
            "optimizer.decayed": f"{OPTIM}.group_overrides",
            "optimizer.clip_grad": f"{SCRIPT}: max_grad_norm",
            "optimizer.z_loss": f"{SCRIPT}: z_loss_multiplier",
            "schedule.warmup_steps": f"{SCRIPT}: CosWithWarmup.warmup_steps",
            "schedule.decay": f"{SCRIPT}: CosWithWarmup",
            "schedule.min_lr_ratio": f"{SCRIPT}: CosWithWarmup.alpha_f, by default",
            "schedule.end_step": f"{SCRIPT}: max_duration, in tokens",
            "stability.on_spike": OPTIM,
            "stability.sigma": f"{OPTIM}.sigma_factor, by default",
            "stability.window": f"{OPTIM}.rolling_interval_length, by default",
            "parallel": "ours: fits 80 GB; OLMo was trained with FSDP",
            "checkpoint.interval": f"{SCRIPT}: CheckpointerCallback.save_interval",
            "checkpoint.asynchronous": "ours",
            "evaluation.interval": f"{SCRIPT}: eval_interval",
        },
    )  # fmt: skip


config = stage1
