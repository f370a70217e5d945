"""The optimizer and its schedule, by megatron-core, the way OLMo was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_olmo_bridge.errors import InputError

from .config import OptimizerConfig, ParallelConfig, ScheduleConfig, StepsConfig, TrainingConfig

Overrides = dict[ParamKey, ParamGroupOverride]
_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


def ddp_config(parallel: ParallelConfig) -> DistributedDataParallelConfig:
    """Return the config of data parallelism, which reduces gradients in float32."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
    )


def make_optimizer(config: TrainingConfig, chunks: Sequence[Any]) -> MegatronOptimizer:
    """Return AdamW over a model's chunks; in bfloat16 it keeps weights and moments in float32."""
    values: OptimizerConfig = config.optimizer
    bf16 = config.train.precision == "bfloat16"
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=values.lr,
            min_lr=values.lr * config.schedule.min_lr_ratio,
            adam_beta1=values.beta1,
            adam_beta2=values.beta2,
            adam_eps=values.eps,
            weight_decay=values.weight_decay,
            clip_grad=values.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap and config.parallel.distributed_optimizer,
        ),
        list(chunks),
        config_overrides=decay_overrides(values.decayed),
    )


def reset_step(optimizer: MegatronOptimizer) -> None:
    """Set the step count of the bias correction to 0, so that the next step is the first."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            if "step" in group:  # of Transformer Engine's and Apex's AdamW
                group["step"] = 0
        for state in inner.state.values():
            if "step" in state:
                state["step"].zero_()


def olmo_weight_decay() -> Overrides:
    """Return ``config_overrides`` that decay everything but the embeddings.

    megatron-core does the opposite by default: it decays the embeddings but no vectors, such as
    norm gains. Source: OLMo-core, ``src/scripts/official/OLMo2``, where
    AdamW has ``weight_decay=0.1`` and one ``OptimGroupOverride`` with ``weight_decay=0.0`` for
    ``embeddings.weight``. OLMoE and OLMo 7B 0424 and 0724 decay the embeddings too
    (``decay_embeddings: true`` in allenai/OLMo's ``configs/official``): ``optimizer.decayed=all``.

    megatron-core applies the multiplier in ``OptimizerParamScheduler``: without one it has no
    effect, and everything is decayed.
    """
    # Tied to an output layer on another pipeline stage, that layer's copy is an embedding too.
    names = ("*embedding.word_embeddings.weight", "*embedding.position_embeddings.weight")
    embeddings = ParamKey(name=names, attr="shared_embedding")
    return {embeddings: ParamGroupOverride(wd_mult=0.0)}


def decay_overrides(decayed: str) -> Overrides | None:
    """Return ``config_overrides`` for a value of ``optimizer.decayed``."""
    choices: dict[str, Overrides | None] = {
        "all_but_embeddings": olmo_weight_decay(),
        "matrices": None,  # megatron-core's default: vectors and biases are spared
        "all": {},
    }
    return choices[decayed]


def make_scheduler(config: TrainingConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Return the learning rate scheduler.

    Step it *before* the optimizer, so that step n has the n-th value and the last step the minimum,
    as in OLMo-core.

    Raises:
        InputError: the step counts are inconsistent.
    """
    schedule, train = config.schedule, config.train
    end = check_schedule(schedule, train)
    decay = config.optimizer.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.lr * schedule.min_lr_ratio,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=end,
        lr_decay_style=_STYLES[schedule.decay],
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=end,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.wsd_decay_steps,
        lr_wsd_decay_style="linear",
    )


def check_schedule(schedule: ScheduleConfig, train: StepsConfig) -> int:
    """Return the step at which the schedule ends.

    Raises:
        InputError: the step counts are inconsistent.
    """
    end = schedule.end_step or train.steps
    if schedule.warmup_steps >= end:
        raise InputError(
            f"schedule.warmup_steps={schedule.warmup_steps} must be less than the {end} steps at "
            "which the schedule ends"
        )
    if schedule.decay == "wsd" and not 0 < schedule.wsd_decay_steps <= end - schedule.warmup_steps:
        raise InputError(
            f"schedule.wsd_decay_steps={schedule.wsd_decay_steps} must be at least 1, and at most "
            f"the {end - schedule.warmup_steps} steps after the warmup"
        )
    return end
