"""Attention kernel that each family would use on this machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megatron_olmo_bridge.runtime.te_import import why_no_transformer_engine

from .families import published_sizes

_SEQUENCE = 4 * 1024
"""Sequence length in tokens, for kernels whose choice depends on it."""


@dataclass(frozen=True)
class AttentionKernel:
    """Attention kernel of a published size, for bfloat16 training."""

    size: str
    layers: str
    """Head width, and the window of the layers that have one."""
    kernel: str


def attention_kernels() -> list[AttentionKernel]:
    """Return the kernels that each family's largest size would use on this machine's GPU.

    The list is empty where Transformer Engine can't be used: attention is then torch's
    ``scaled_dot_product_attention``.
    """
    if why_no_transformer_engine() is not None:
        return []
    largest = {bridge: size for size, bridge in published_sizes().items()}
    kernels = []
    for bridge, size in largest.items():
        config = bridge(bridge.sizes[size]).config
        heads = f"heads of {config.kv_channels}"
        kernels.append(AttentionKernel(size, heads, _kernel(config, (-1, 0))))
        if window := getattr(config, "window_size", None):
            layers = f"{heads}, window of {window[0] + 1}"
            kernels.append(AttentionKernel(size, layers, _kernel(config, window)))
    return kernels


def _kernel(config: Any, window: tuple[int, int]) -> str:
    """Return the choice of Transformer Engine's ``get_attention_backend`` (2.6 to 2.20).

    Args:
        window: tokens before and after itself that a query sees; -1 for all.
    """
    try:
        from transformer_engine.pytorch.attention.dot_product_attention import utils

        known_fields = {field.name for field in fields(utils.AttentionParams)}
        values: dict[str, Any] = {
            "qkv_layout": "sbhd_sbhd_sbhd",
            "num_heads": config.num_attention_heads,
            "num_gqa_groups": getattr(config, "num_query_groups", config.num_attention_heads),
            "max_seqlen_q": _SEQUENCE,
            "max_seqlen_kv": _SEQUENCE,
            "head_dim_qk": config.kv_channels,
            "head_dim_v": config.kv_channels,
            "attn_mask_type": "causal",
            "window_size": window,
            "bottom_right_diagonal": False,
        }
        params = utils.AttentionParams(**{k: v for k, v in values.items() if k in known_fields})
        flash, flash_version, fused, fused_backend, unfused, *_ = utils.get_attention_backend(
            params
        )
    except Exception as error:  # the function is internal and may change: report, don't fail
        return f"not known: {type(error).__name__}: {error}"
    if flash:
        return f"flash attention {flash_version}"
    if fused:
        return f"cuDNN's fused attention (backend {int(fused_backend)})"
    return "Transformer Engine's unfused attention" if unfused else "none"
