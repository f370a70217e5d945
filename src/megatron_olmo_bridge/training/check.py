"""Whether each value of a config can be, by itself: looked at before anything is opened.

What depends on several values, on the model, the data or the processes is checked where these are
known: ``layout.checks``, ``optimizer.check_schedule``, ``token_data.check_data``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_olmo_bridge.errors import InputError

from .config import TrainingConfig

CHOICES = {
    "train.precision": ("float32", "bfloat16"),
    "optimizer.decayed": ("all_but_embeddings", "matrices", "all"),
    "schedule.decay": ("cosine", "linear", "wsd", "constant"),
    "stability.on_spike": ("stop", "skip", "ignore"),
    "parallel.recompute": ("none", "selective", "full"),
    "checkpoint.fully_reshardable": ("last", "all", "none"),
}
"""What each field that names one of several ways may say."""
RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (lambda value: value >= 1, (
        "train.steps", "train.global_batch_size", "train.micro_batch_size",
        "train.sequence_length", "parallel.tp", "parallel.pp", "parallel.vpp", "parallel.ep",
        "parallel.timeout_minutes",
        "schedule.end_step", "checkpoint.interval", "checkpoint.keep_last", "evaluation.interval",
        "evaluation.batches", "logging.interval", "export.interval", "classification.patience",
        "provider.make_vocab_size_divisible_by",
    )),
    "at least 2": (lambda value: value >= 2, ("stability.window",)),
    "at least 0": (lambda value: 0 <= value < math.inf, (
        "optimizer.lr", "optimizer.weight_decay", "optimizer.clip_grad", "optimizer.z_loss",
        "schedule.warmup_steps", "schedule.wsd_decay_steps", "data.workers",
        "classification.baseline_lr", "provider.init_method_std",
    )),
    "more than 0": (lambda value: value > 0, (
        "optimizer.eps", "stability.sigma", "provider.init_truncation",
    )),
    "at least 0 and less than 1": (lambda value: 0 <= value < 1, (
        "optimizer.beta1", "optimizer.beta2", "provider.hidden_dropout",
        "provider.attention_dropout",
    )),
    "from 0 to 1": (lambda value: 0 <= value <= 1, ("schedule.min_lr_ratio",)),
    "from 0 to 4294967295": (lambda value: 0 <= value < 2**32, ("train.seed",)),  # numpy's
}  # fmt: skip
"""What a number must be, whether it is, and the fields of which that is asked, if they are set."""


def check_values(config: TrainingConfig) -> None:
    """Refuse values that can't be.

    Raises:
        InputError: a number out of its range, no such choice, or a field without what it is of.
    """
    for key, choices in CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise InputError(f"{key}={value!r} is none of {', '.join(choices)}")
    for what, (holds, keys) in RANGES.items():
        for key in keys:
            value = _value(config, key)
            if value is not None and not (isinstance(value, int | float) and holds(value)):
                raise InputError(f"{key}={value} must be {what}")
    init = config.init
    if init.hf and init.checkpoint:
        raise InputError("give either init.hf or init.checkpoint")
    if init.optimizer and not init.checkpoint:
        raise InputError("init.optimizer=true takes the optimizer from init.checkpoint: name it")
    if init.revision and not init.hf:
        raise InputError(f"init.revision={init.revision} is one of a hub id: name it as init.hf")


def _value(config: TrainingConfig, key: str) -> Any:
    """Of ``section.field``; None where there is no such section or field."""
    section, _, name = key.partition(".")
    values = getattr(config, section)
    return values.get(name) if isinstance(values, dict) else getattr(values, name, None)
