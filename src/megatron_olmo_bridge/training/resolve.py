"""Resolve a config once: the model, the layout and megatron-core's config that follow from it.

Everything after takes what it needs from the :class:`ResolvedRun`.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.errors import BridgeError, InputError, nearest
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridge_for

from .config import TrainingConfig, check_values
from .layout import Layout

if TYPE_CHECKING:
    from megatron_olmo_bridge.models.provider import GPTModelProvider

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
_SET_ELSEWHERE = {
    "params_dtype": "train.precision",
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "expert_model_parallel_size": "parallel.ep",
    "sequence_parallel": "parallel.sp",
    "num_layers": "the model's config",
    "hidden_size": "the model's config",
    "ffn_hidden_size": "the model's config",
    "num_attention_heads": "the model's config",
    "kv_channels": "the model's config",
    "num_query_groups": "the model's config",
    "vocab_size": "the model's config",
    "num_moe_experts": "the model's config",
    "num_labels": "the model's config",
    "share_embeddings_and_output_weights": "the model's config",
    "problem_type": "the model's config",
}
"""Fields of the provider that other settings decide: batches, memory and files depend on them."""


@dataclass(frozen=True)
class ResolvedRun:
    """A valid config and everything derived from it before the model is built."""

    config: TrainingConfig
    """The config with its model filled in."""
    source: Checkpoint | None
    """The checkpoint that the weights come from; None for random weights."""
    bridge: ModelBridge
    layout: Layout
    provider: GPTModelProvider
    """Builds the model; megatron-core has accepted its fields."""


def resolve(config: TrainingConfig, source: Checkpoint | None, processes: int) -> ResolvedRun:
    """Check a config and derive everything else from it, before the model is built.

    Needs megatron-core, which checks its own fields, but no process group.

    Args:
        config: with its model filled in.
        source: the checkpoint that the weights come from, if any.
        processes: world size of the run.

    Raises:
        InputError: an impossible value, layout, batch, schedule or provider field.
        UnsupportedError: a possible one that isn't supported.
    """
    from .optimizer import check_schedule

    check_values(config)
    check_schedule(config.schedule, config.train)
    bridge = bridge_of(config)
    _check_settings(config, bridge)
    provider = _provider(config, bridge)
    return ResolvedRun(config, source, bridge, Layout.of(config, processes), provider)


def bridge_of(config: TrainingConfig) -> ModelBridge:
    """Return the bridge of the model that the config itself describes.

    Raises:
        InputError: it describes none.
        UnsupportedError: no bridge handles it.
    """
    if not config.model:
        raise InputError("no model: a recipe gives one, or name one as init.hf=FOLDER")
    return bridge_for(config.model, "the recipe's model")


def _check_settings(config: TrainingConfig, bridge: ModelBridge) -> None:
    """Refuse settings that don't fit together, or not the model; megatron-core checks the rest."""
    if bridge.num_labels and config.classification is None:
        raise InputError(
            f"the model is a classifier of {bridge.num_labels} labels, the task is to predict "
            "tokens: begin with a language model, or with the recipe complaints"
        )
    if config.init.step is not None and config.init.step >= config.train.steps:
        raise InputError(
            f"train.steps={config.train.steps}: no step is left, as the run that it continues has "
            f"taken {config.init.step}"
        )
    parallel, length = config.parallel, config.train.sequence_length
    positions = bridge.config.max_position_embeddings
    if length > positions:
        raise InputError(
            f"train.sequence_length={length} is more than the model's {positions} positions "
            "(model.max_position_embeddings)"
        )
    if parallel.sp and parallel.tp == 1:
        raise InputError("parallel.sp=true splits tokens over parallel.tp, which is 1")
    if parallel.sp and length % parallel.tp:
        raise InputError(
            f"parallel.sp splits the train.sequence_length={length} tokens of a sequence: they "
            f"must be a multiple of parallel.tp={parallel.tp}"
        )
    if bridge.num_experts and parallel.tp > 1 and not parallel.sp:
        raise InputError(
            f"megatron-core trains a mixture of experts with parallel.tp={parallel.tp} only if "
            "parallel.sp=true"
        )
    if parallel.vpp and parallel.pp == 1:
        raise InputError(
            f"parallel.vpp={parallel.vpp} cuts up pipeline stages: set parallel.pp too"
        )


def _provider(config: TrainingConfig, bridge: ModelBridge) -> GPTModelProvider:
    """Return the provider, finalized.

    Raises:
        InputError: a field does not exist, is set elsewhere, or is refused by megatron-core.
    """
    fields = _provider_fields(config, bridge)
    try:
        provider = bridge.provider(**fields)
        provider.finalize()
    except BridgeError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # of a field's type
        raise InputError(f"megatron-core refuses the fields of provider: {error}") from error
    return provider


def _provider_fields(config: TrainingConfig, bridge: ModelBridge) -> dict[str, Any]:
    """Return the fields for layout and precision, overridden by ``config.provider``."""
    import torch

    known = pkgutil.resolve_name(bridge.provider_class).field_names()
    for name in config.provider:
        if name not in known:
            raise InputError(
                f"provider.{name}: the provider has no such field{nearest(name, known)}"
            )
        if name in _SET_ELSEWHERE:
            raise InputError(f"provider.{name}: is set by {_SET_ELSEWHERE[name]}; change it there")
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
