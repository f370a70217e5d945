"""Check that a model can be divided over the ranks of a parallel layout."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_olmo_bridge.errors import InputError, UnsupportedError

_UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Fields of megatron-core's config that give stages different numbers of layers."""


def check_layout(config: TransformerConfig) -> None:
    """Refuse a layout over which the model's sizes cannot be divided evenly.

    Raises:
        InputError: Heads, rows, layers or experts do not divide.
        UnsupportedError: Context parallelism.
    """
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "make_vocab_size_divisible_by",
    ):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be a whole number of at least 1")
    _check_tensor_parallel(config)
    _check_pipeline(config)
    if config.context_parallel_size > 1:
        raise UnsupportedError(
            f"context_parallel_size={config.context_parallel_size} is not supported: use tensor, "
            "sequence, pipeline, expert or data parallelism"
        )
    ranks, experts = config.expert_model_parallel_size, config.num_moe_experts
    if ranks > 1 and (experts is None or experts % ranks):
        raise InputError(
            f"{experts or 'no'} experts cannot be divided evenly over {ranks} expert-parallel ranks"
        )


def _check_tensor_parallel(config: TransformerConfig) -> None:
    ranks = config.tensor_model_parallel_size
    heads = config.num_attention_heads
    groups = config.num_query_groups or heads
    if heads % groups:
        raise InputError(
            f"{heads} attention heads cannot be divided evenly over {groups} key/value heads"
        )
    for count, what in (
        (heads, "attention heads"),
        (groups, "key/value heads"),
        (config.ffn_hidden_size or 4 * config.hidden_size, "rows of the MLP"),
    ):
        if count % ranks:
            raise InputError(
                f"{count} {what} cannot be divided evenly over {ranks} tensor-parallel ranks"
            )


def _check_pipeline(config: TransformerConfig) -> None:
    stages = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual is not None and stages == 1:
        raise InputError(
            "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size above 1"
        )
    uneven = any(getattr(config, name) for name in _UNEVEN_STAGES)
    if config.num_layers % (stages * (virtual or 1)) and not uneven:
        chunks = f" of {virtual} chunks each" if virtual else ""
        raise InputError(
            f"{config.num_layers} layers cannot be divided evenly over {stages} pipeline "
            f"stages{chunks}; set one of {', '.join(_UNEVEN_STAGES)}"
        )
