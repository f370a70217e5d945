"""megatron-core's fused kernels: turn on those that run here, refuse those never tested."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

from megatron_olmo_bridge.errors import UnsupportedError

_CUDA_GRAPHS = (
    "enable_cuda_graph",
    "external_cuda_graph",
    "cuda_graph_impl",
    "cuda_graph_scope",
    "cuda_graph_modules",
    "inference_cuda_graph_scope",
)
"""Fields of megatron-core 0.16.1 and 0.19.2 that turn CUDA graphs on."""
_OFF: tuple[Any, ...] = (None, False, "none", "full", [])
"""Values of these fields that leave CUDA graphs off; scopes default to "full" or []."""


def set_fused_fields(config: Any) -> None:
    """Turn on the fused kernels that run with Transformer Engine on a GPU.

    With ``fusions=False`` only rope is fused.
    """
    # The kernel takes sines and cosines in float32; the unfused rope rounds them.
    config.apply_rope_fusion = True
    if not config.fusions:
        return
    # torch compiles these two; on a CPU it would need a C++ compiler.
    config.bias_dropout_fusion = True
    # SwiGLU only: megatron-core's fused GeLU is always the tanh approximation.
    config.bias_activation_fusion = (
        config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    )
    if config.num_moe_experts is not None:
        config.moe_token_dispatcher_type = "alltoall"
        # Only some versions of Transformer Engine have these kernels.
        config.moe_permute_fusion = moe_utils.fused_permute is not None
        config.moe_router_fusion = moe_utils.fused_topk_with_score_function is not None


def can_fuse_gradients() -> bool:
    """Return whether all linears can add their gradients to float32 buffers.

    Transformer Engine's linears can; megatron-core's output layer needs APEX's extension.
    """
    return bool(layers._grad_accum_fusion_available)


def refuse_unsupported(config: TransformerConfig) -> None:
    """Refuse options that these models were never tested with, before they fail obscurely.

    Raises:
        UnsupportedError: CUDA graphs, or tensor-parallel communication overlap.
    """
    if config.tp_comm_overlap:
        raise UnsupportedError("tp_comm_overlap is not supported: set it to False")
    for name in _CUDA_GRAPHS:
        value = getattr(config, name, None)
        if getattr(value, "name", value) not in _OFF:  # some are an Enum's members
            raise UnsupportedError(f"{name}={value!r}: CUDA graphs are not supported; leave it out")
