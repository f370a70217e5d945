"""Division of a run over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_olmo_bridge.errors import InputError

from .config import TrainingConfig


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a run at a world size."""

    processes: int
    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    """Tensor parallel size of experts; megatron-core's default is ``tp``."""
    micro_batches: int
    """Micro-batches per process and optimizer step."""

    @property
    def dp(self) -> int:
        """Data-parallel size: processes that hold the same weights and split the batch."""
        return self.processes // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Processes that hold the same experts."""
        return self.processes // (self.etp * self.ep * self.pp)

    @classmethod
    def of(cls, config: TrainingConfig, processes: int) -> Layout:
        """Return the layout of a run at a world size.

        Raises:
            InputError: ``processes`` is not a multiple of the product of the parallel sizes, or the
                batch can't be divided evenly over them.
        """
        parallel, train = config.parallel, config.train
        needed = minimum_processes(config)
        if processes < 1 or processes % needed:
            raise InputError(
                f"{_sizes(config)} takes {needed} processes or a multiple of it, not {processes}. "
                f"Start it with --processes {needed}, or by torchrun --nproc_per_node {needed}."
            )
        dp = processes // (parallel.tp * parallel.pp)
        sequences_at_once = dp * train.micro_batch_size
        if train.global_batch_size % sequences_at_once:
            raise InputError(
                f"train.global_batch_size={train.global_batch_size} cannot be divided evenly into "
                f"micro-batches of {train.micro_batch_size} over {dp} data-parallel ranks; a "
                f"multiple of {sequences_at_once} can"
            )
        micro_batches = train.global_batch_size // sequences_at_once
        if parallel.vpp and micro_batches % parallel.pp:
            raise InputError(
                f"with parallel.vpp={parallel.vpp} the {micro_batches} micro-batches of a step "
                f"must be a multiple of parallel.pp={parallel.pp}"
            )
        return cls(
            processes=processes,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp or 1,
            ep=parallel.ep,
            etp=_expert_tp(config),
            micro_batches=micro_batches,
        )


def minimum_processes(config: TrainingConfig) -> int:
    """Return the smallest world size that the parallel sizes allow."""
    parallel = config.parallel
    return math.lcm(parallel.tp, _expert_tp(config) * parallel.ep) * parallel.pp


def _sizes(config: TrainingConfig) -> str:
    """Return the parallel sizes that decide how many processes a run takes, for a message."""
    sizes = {f"parallel.{name}": getattr(config.parallel, name) for name in ("tp", "pp", "ep")}
    if _expert_tp(config) != config.parallel.tp:
        sizes["provider.expert_tensor_parallel_size"] = _expert_tp(config)
    return " x ".join(f"{name}={n}" for name, n in sizes.items() if n > 1) or "a run"


def _expert_tp(config: TrainingConfig) -> int:
    return int(config.provider.get("expert_tensor_parallel_size") or config.parallel.tp)
