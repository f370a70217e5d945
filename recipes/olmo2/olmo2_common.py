"""What the OLMo-2 recipes share: model, optimizer, and where each value is published.

The initial weights are drawn as OLMo draws them: from a normal distribution cut off at 3 standard
deviations. Schedules that are published in tokens end at the first step that has all of them; the
last checkpoint of OLMo's own trainer is 10 steps later (``extra_steps_after_cancel``).
"""

from __future__ import annotations

from typing import Any

from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    InitConfig,
    OptimizerConfig,
    TrainingConfig,
)

OURS = {
    "train.micro_batch_size": "ours: fits 80 GB",
    "parallel": "ours: fits 80 GB; OLMo was trained with FSDP",
    "checkpoint.asynchronous": "ours",
}


CONTINUED = InitConfig(optimizer=True)
"""Stage 2 goes on with stage 1's weights and moments: ``init.checkpoint`` is its folder."""


def olmo2(size: str, lr: float, **sections: Any) -> TrainingConfig:
    """Return a run of an OLMo-2 model, with what all sizes and stages share."""
    return TrainingConfig(
        model=dict(published_sizes()[size].sizes[size]),
        provider={"init_method_std": 0.02, "init_truncation": 3.0},
        optimizer=OptimizerConfig(
            lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            decayed="all_but_embeddings", clip_grad=1.0, z_loss=1e-5,
        ),
        checkpoint=CheckpointConfig(interval=1000, asynchronous=True),
        evaluation=EvaluationConfig(interval=1000),
        **sections,
    )  # fmt: skip


def of_yaml(file: str, repository: str, revision: str) -> dict[str, str]:
    """Return the source of each value in a config of the first OLMo trainer.

    Args:
        file: below ``configs/`` of allenai/OLMo.
        repository: of the model on the hub.
        revision: there, with the number of steps in its name.
    """
    keys = {
        "provider.init_method_std": "model.init_std",
        "provider.init_truncation": "model.init_cutoff_factor",
        "train.global_batch_size": "global_train_batch_size",
        "train.sequence_length": "model.max_sequence_length",
        "train.precision": "precision: amp_bf16",
        "train.seed": "seed",
        "optimizer.lr": "optimizer.learning_rate",
        "optimizer.beta1": "optimizer.betas",
        "optimizer.beta2": "optimizer.betas",
        "optimizer.eps": "optimizer.eps",
        "optimizer.weight_decay": "optimizer.weight_decay",
        "optimizer.decayed": "optimizer.decay_norm_and_bias, decay_embeddings",
        "optimizer.clip_grad": "max_grad_norm",
        "optimizer.z_loss": "auxiliary_loss_multiplier",
        "schedule.warmup_steps": "scheduler.t_warmup, in tokens",
        "schedule.decay": "scheduler.name",
        "schedule.min_lr_ratio": "scheduler.alpha_f",
        "schedule.end_step": "scheduler.t_max, else max_duration; in tokens, rounded up",
        "checkpoint.interval": "save_interval",
        "evaluation.interval": "eval_interval",
    }
    return _sources(f"allenai/OLMo configs/{file}", keys, repository, revision)


def of_script(file: str, repository: str, revision: str) -> dict[str, str]:
    """Return the source of each value in OLMo-core; ``file`` is below ``src/scripts/official/``."""
    optim = "SkipStepAdamWConfig"
    keys = {
        "provider.init_method_std": "TransformerConfig.init_std, by default",
        "provider.init_truncation": "InitMethod.normal: 3 standard deviations",
        "train.global_batch_size": "global_batch_size, in tokens",
        "train.sequence_length": "DEFAULT_SEQUENCE_LENGTH",
        "train.precision": "dp_config.param_dtype",
        "train.seed": "data_loader.seed",
        "optimizer.lr": f"{optim}.lr",
        "optimizer.beta1": f"{optim}.betas",
        "optimizer.beta2": f"{optim}.betas",
        "optimizer.eps": f"{optim}.eps, by default",
        "optimizer.weight_decay": f"{optim}.weight_decay",
        "optimizer.decayed": f"{optim}.group_overrides",
        "optimizer.clip_grad": "max_grad_norm",
        "optimizer.z_loss": "z_loss_multiplier",
        "schedule.warmup_steps": "scheduler.warmup_steps",
        "schedule.decay": "scheduler",
        "schedule.min_lr_ratio": "scheduler.alpha_f",
        "schedule.end_step": "max_duration, in tokens, rounded up",
        "stability.on_spike": optim,
        "stability.sigma": f"{optim}.sigma_factor, by default",
        "stability.window": f"{optim}.rolling_interval_length, by default",
        "checkpoint.interval": "CheckpointerCallback.save_interval",
        "checkpoint.asynchronous": "CheckpointerCallback.save_async",
        "evaluation.interval": "eval_interval",
    }
    return _sources(f"allenai/OLMo-core src/scripts/official/{file}", keys, repository, revision)


def _sources(file: str, keys: dict[str, str], repository: str, revision: str) -> dict[str, str]:
    return {
        **OURS,
        "model": f"{repository}: config.json",
        "train.steps": f"{repository}: revision {revision}",
        **{field: f"{file}: {key}" for field, key in keys.items()},
    }
