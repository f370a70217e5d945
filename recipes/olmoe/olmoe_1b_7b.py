"""OLMoE-1B-7B (OLMoE-1B-7B-0924): 5.03T tokens, up to the step that it was annealed from.

The cosine has reached its minimum before the last step. How the 100B tokens of annealing were run
is not in the config that is published, and no recipe here.

The layout fits one node of 8 GPUs of 80 GB, or any number of such nodes.
"""

from __future__ import annotations

from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)

REPOSITORY = "allenai/OLMoE-1B-7B-0924"
YAML = "allenai/OLMo configs/official/OLMoE-1B-7B-0824.yml"


def config() -> TrainingConfig:
    return TrainingConfig(
        name="olmoe-1b-7b",
        model=dict(published_sizes()["olmoe-1b-7b"].sizes["olmoe-1b-7b"]),
        provider={
            "init_method_std": 0.02, "init_truncation": 3.0,
            "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001,
        },
        train=StepsConfig(
            steps=1_200_000, global_batch_size=1024, micro_batch_size=2, sequence_length=4096,
            precision="bfloat16", seed=6198,
        ),
        optimizer=OptimizerConfig(
            lr=4e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decayed="all",
            clip_grad=1.0, z_loss=0.0,
        ),
        schedule=ScheduleConfig(
            warmup_steps=2500, decay="cosine", min_lr_ratio=0.1, end_step=1_192_093
        ),
        parallel=ParallelConfig(ep=8, overlap=True),
        checkpoint=CheckpointConfig(interval=5000, asynchronous=True),
        evaluation=EvaluationConfig(interval=5000),
        sources={
            "model": f"{REPOSITORY}: config.json",
            "provider.init_method_std": f"{YAML}: model.init_std",
            "provider.init_truncation": f"{YAML}: model.init_cutoff_factor",
            "provider.moe_aux_loss_coeff": f"{YAML}: model.moe_loss_weight",
            "provider.moe_z_loss_coeff": f"{YAML}: model.moe_zloss_weight",
            "train.steps": f"{REPOSITORY}: revision step1200000-tokens5033B",
            "train.global_batch_size": f"{YAML}: global_train_batch_size",
            "train.micro_batch_size": "ours: fits 80 GB",
            "train.sequence_length": f"{YAML}: model.max_sequence_length",
            "train.precision": f"{YAML}: precision: amp_bf16",
            "train.seed": f"{YAML}: seed",
            "optimizer.lr": f"{YAML}: optimizer.learning_rate",
            "optimizer.beta1": f"{YAML}: optimizer.betas",
            "optimizer.beta2": f"{YAML}: optimizer.betas",
            "optimizer.eps": f"{YAML}: optimizer.eps",
            "optimizer.weight_decay": f"{YAML}: optimizer.weight_decay",
            "optimizer.decayed": f"{YAML}: optimizer.decay_norm_and_bias, decay_embeddings",
            "optimizer.clip_grad": f"{YAML}: max_grad_norm",
            "optimizer.z_loss": f"{YAML}: there is no softmax_auxiliary_loss",
            "schedule.warmup_steps": f"{YAML}: scheduler.t_warmup, in tokens",
            "schedule.decay": f"{YAML}: scheduler.name",
            "schedule.min_lr_ratio": f"{YAML}: scheduler.alpha_f",
            "schedule.end_step": f"{YAML}: scheduler.t_max, in tokens, rounded up",
            "parallel": "ours: fits 80 GB; OLMoE was trained with FSDP",
            "checkpoint.interval": f"{YAML}: save_interval",
            "checkpoint.asynchronous": "ours",
            "evaluation.interval": f"{YAML}: eval_interval",
        },
    )  # fmt: skip
