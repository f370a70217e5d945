"""How a run is shared out over processes, and whether it can be."""

from __future__ import annotations

import math
import pkgutil
from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.errors import BridgeError, InputError, nearest
from megatron_olmo_bridge.models.bridge import ModelBridge, bridge_for

from .check import check_values
from .config import TrainingConfig

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    },
}  # fmt: skip
_SAID_ELSEWHERE = {
    "params_dtype": "train.precision",
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "expert_model_parallel_size": "parallel.ep",
    "sequence_parallel": "parallel.sp",
    **dict.fromkeys(
        (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
            "num_query_groups", "vocab_size", "num_moe_experts", "num_labels",
            "share_embeddings_and_output_weights", "problem_type",
        ),
        "the model's config",
    ),
}  # fmt: skip
"""Fields of the provider that others stand for: batches, memory and files are reckoned by these."""


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
                f"{sizes} takes {needed} processes or a multiple of it, not {processes}. Start it "
                f"with --processes {needed}, or by torchrun --nproc_per_node {needed}."
            )
        dp = processes // (parallel.tp * parallel.pp)
        at_once = dp * train.micro_batch_size
        if train.global_batch_size % at_once:
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
    """Processes that the parallel sizes take at least."""
    parallel = config.parallel
    return math.lcm(parallel.tp, _expert_tp(config) * parallel.ep) * parallel.pp


def checks(config: TrainingConfig, processes: int) -> None:
    """Refuse what can't be run on so many processes, before anything is built.

    Needs megatron-core, whose rules are asked for, but no process group.

    Raises:
        InputError: a value, layout, batch, schedule or provider field that can't be.
        UnsupportedError: one that could be, but isn't supported.
    """
    from .optimizer import check_schedule

    check_values(config)
    check_schedule(config.schedule, config.train)
    bridge = model_of(config)
    if bridge.num_labels and config.classification is None:
        raise InputError(
            f"the model is a classifier of {bridge.num_labels} labels, the task is to predict "
            "tokens: begin with a language model, or with the recipe complaints"
        )
    parallel, length = config.parallel, config.train.sequence_length
    positions = bridge.config.max_position_embeddings
    if length > positions:
        raise InputError(
            f"train.sequence_length={length} is more than the model's {positions} positions "
            "(model.max_position_embeddings)"
        )
    if parallel.sp and parallel.tp == 1:
        raise InputError("parallel.sp=true shares out tokens over parallel.tp, which is 1")
    if parallel.vpp and parallel.pp == 1:
        raise InputError(
            f"parallel.vpp={parallel.vpp} cuts up pipeline stages: set parallel.pp too"
        )
    _check_provider(bridge, provider_fields(config))
    if parallel.sp and length % parallel.tp:
        raise InputError(
            f"parallel.sp shares out the train.sequence_length={length} tokens of a sequence: they "
            f"must be a multiple of parallel.tp={parallel.tp}"
        )
    Layout.of(config, processes)


def _check_provider(bridge: ModelBridge, given: dict[str, Any]) -> None:
    try:
        bridge.provider(**given).finalize()
    except BridgeError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # of a field's type
        raise InputError(f"megatron-core refuses the fields of provider: {error}") from error


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
        InputError: the provider has no such field, or it is set elsewhere.
    """
    import torch

    provider = pkgutil.resolve_name(model_of(config).provider_class)
    known = provider.field_names()
    for name in config.provider:
        if name not in known:
            raise InputError(
                f"provider.{name}: the provider has no such field{nearest(name, known)}"
            )
        if name in _SAID_ELSEWHERE:
            raise InputError(f"provider.{name}: is said by {_SAID_ELSEWHERE[name]}; set it there")
    parallel = config.parallel
    return {
        "params_dtype": getattr(torch, config.train.precision),
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
