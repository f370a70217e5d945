"""How a run is shared out over processes, and whether it can be."""

from __future__ import annotations

import math
import pkgutil
from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.bridge import ModelBridge, bridge_for

from .config import TrainingConfig

PRECISIONS = ("float32", "bfloat16")
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The parallel sizes of a run, with what follows from the number of processes."""

    processes: int
    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    """Tensor parallel size of experts; megatron-core's default is ``tp``."""
    micro_batches: int
    """Of each process, in one optimizer step."""

    @property
    def dp(self) -> int:
        """Processes that hold the same weights, and share out the batch."""
        return self.processes // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Processes that hold the same experts."""
        return self.processes // (self.etp * self.ep * self.pp)

    @classmethod
    def of(cls, config: TrainingConfig, processes: int) -> Layout:
        """The layout of so many processes.

        Raises:
            InputError: they are not a multiple of what the parallel sizes take, or the batch can't
                be shared out over them.
        """
        parallel, train = config.parallel, config.train
        needed = smallest(config)
        if processes < 1 or processes % needed:
            sizes = " x ".join(
                f"parallel.{name}={size}"
                for name in ("tp", "pp", "ep")
                if (size := getattr(parallel, name)) > 1
            )
            raise InputError(
                f"{sizes} takes {needed} processes or a multiple of it, not {processes}"
            )
        dp = processes // (parallel.tp * parallel.pp)
        at_once = dp * train.micro_batch_size
        if train.global_batch_size < 1 or train.global_batch_size % at_once:
            raise InputError(
                f"train.global_batch_size={train.global_batch_size} cannot be shared out evenly in "
                f"micro-batches of {train.micro_batch_size} over {dp} data-parallel ranks; a "
                f"multiple of {at_once} can"
            )
        micro_batches = train.global_batch_size // at_once
        if parallel.vpp and micro_batches % parallel.pp:
            raise InputError(
                f"with parallel.vpp={parallel.vpp} the {micro_batches} micro-batches of a step "
                f"must be a multiple of parallel.pp={parallel.pp}"
            )
        return cls(
            processes=processes, tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp or 1,
            ep=parallel.ep, etp=_expert_tp(config), micro_batches=micro_batches,
        )  # fmt: skip


def smallest(config: TrainingConfig) -> int:
    """Processes that the parallel sizes take at least.

    Raises:
        InputError: a size, or the micro-batch, is less than 1.
    """
    parallel, train = config.parallel, config.train
    for name, size in (
        ("parallel.tp", parallel.tp), ("parallel.pp", parallel.pp), ("parallel.ep", parallel.ep),
        ("parallel.vpp", parallel.vpp or 1), ("train.micro_batch_size", train.micro_batch_size),
        ("train.sequence_length", train.sequence_length),
    ):  # fmt: skip
        if size < 1:
            raise InputError(f"{name}={size} must be a whole number of at least 1")
    return math.lcm(parallel.tp, _expert_tp(config) * parallel.ep) * parallel.pp


def checks(config: TrainingConfig, processes: int) -> None:
    """Refuse what can't be run on so many processes, before anything is built.

    Needs megatron-core, whose rules are asked for, but no process group.

    Raises:
        InputError: a layout, batch, schedule, precision or provider field that can't be.
        UnsupportedError: one that could be, but isn't supported.
    """
    from .optimizer import check_schedule

    bridge = model_of(config)
    check_schedule(config.schedule, config.train)
    Layout.of(config, processes)
    parallel, length = config.parallel, config.train.sequence_length
    positions = bridge.config.max_position_embeddings
    if length > positions:
        raise InputError(
            f"train.sequence_length={length} is more than the model's {positions} positions "
            "(model.max_position_embeddings)"
        )
    if parallel.sp and parallel.tp == 1:
        raise InputError("parallel.sp=true shares out tokens over parallel.tp, which is 1")
    bridge.provider(**provider_fields(config)).finalize()
    if parallel.sp and length % parallel.tp:
        raise InputError(
            f"parallel.sp shares out the train.sequence_length={length} tokens of a sequence: they "
            f"must be a multiple of parallel.tp={parallel.tp}"
        )


def model_of(config: TrainingConfig) -> ModelBridge:
    """The model that the config itself has.

    Raises:
        InputError: it has none.
        UnsupportedError: nothing here handles it.
    """
    if not config.model:
        raise InputError("no model: a recipe gives one, or name one as init.hf=FOLDER")
    return bridge_for(config.model, "the recipe's model")


def provider_fields(config: TrainingConfig) -> dict[str, Any]:
    """What the provider is told of layout and precision; ``config.provider`` has the last word.

    Raises:
        InputError: no such precision, kind of recomputation, or field of the provider.
    """
    import torch

    provider = pkgutil.resolve_name(model_of(config).provider_class)
    for name in config.provider:
        if not hasattr(provider, name):
            raise InputError(f"provider.{name}: the provider has no such field")
    parallel, precision = config.parallel, config.train.precision
    if precision not in PRECISIONS:
        raise InputError(f"train.precision={precision!r} is none of {', '.join(PRECISIONS)}")
    if parallel.recompute not in _RECOMPUTE:
        raise InputError(
            f"parallel.recompute={parallel.recompute!r} is none of {', '.join(_RECOMPUTE)}"
        )
    return {
        "params_dtype": getattr(torch, precision),
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp,
        "expert_model_parallel_size": parallel.ep,
        "sequence_parallel": parallel.sp,
        # Rows that pad the vocabulary get no probability: see nn/cross_entropy.py.
        "make_vocab_size_divisible_by": parallel.tp,
        **_RECOMPUTE[parallel.recompute],
        **config.provider,
    }


def _expert_tp(config: TrainingConfig) -> int:
    return int(config.provider.get("expert_tensor_parallel_size") or config.parallel.tp)
