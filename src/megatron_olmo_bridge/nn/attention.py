"""Attention on ``torch.nn.functional.scaled_dot_product_attention``.

megatron-core's own attention without Transformer Engine stores the scores of all pairs of
positions. This one doesn't, on the CPU or on GPUs.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_olmo_bridge.errors import UnsupportedError

from .attention_mask import check_mask

_NOTHING = contextlib.nullcontext()


class ScaledDotProductAttention(torch.nn.Module):
    """``core_attention`` for megatron-core's layers; has no parameters.

    Args:
        config: dropout and windows; context parallelism and other softmax types are refused.
        layer_number: index from 1, which decides whether the layer has a window.
        softmax_scale: factor of the scores; by default 1 / sqrt(head_dim).
        unused: other arguments of megatron-core: mask type, process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise UnsupportedError("context parallelism needs Transformer Engine's attention")
        if config.softmax_type != "vanilla":
            raise UnsupportedError(
                f"softmax_type={config.softmax_type!r} needs Transformer Engine's attention"
            )
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: int | None = config.window_size[0] + 1 if windowed else None
        """Number of tokens that a query sees, including itself."""
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout, self.sequence_parallel = dropout, config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Compute causal attention, or attention under a mask.

        Args:
            query: [s, b, heads / TP, head_dim].
            key, value: [t, b, key/value heads / TP, head_dim]; t > s where keys are cached, and
                the queries are then the last s. Queries and keys are cast to the values' dtype.
            attention_mask: bool, [b or 1, 1, s, t], True where attention is not allowed.

        Returns:
            [s, b, heads / TP * head_dim]

        Raises:
            InputError: the mask has the wrong shape or dtype.
            UnsupportedError: packed sequences or an attention bias.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise UnsupportedError(
                "packed sequences and attention biases need Transformer Engine's attention"
            )
        length, past = query.shape[0], key.shape[0] - query.shape[0]
        allowed = None
        if attention_mask is not None:
            check_mask(attention_mask, length, length + past)
            allowed = ~attention_mask
        seen = self._seen(length, past, query.device)
        if seen is not None:
            allowed = seen if allowed is None else allowed & seen
        q, k, v = (x.to(value.dtype).permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout and not self.sequence_parallel else _NOTHING:
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=allowed,
                dropout_p=dropout,
                scale=self.scale,
                is_causal=allowed is None and length > 1,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _seen(self, length: int, past: int, device: torch.device) -> torch.Tensor | None:
        """Return bool [length, length + past], True where a key is before the query and in its
        window; None for plain causal attention, or if every key is seen."""
        narrow = self.window is not None and length + past > self.window
        if not narrow and (length == 1 or not past):
            return None
        seen = torch.ones(length, length + past, dtype=torch.bool, device=device).tril(past)
        return seen.triu(past - self.window + 1) if self.window is not None else seen
