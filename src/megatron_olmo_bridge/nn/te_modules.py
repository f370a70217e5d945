"""Masked attention and a post-norm linear, made of Transformer Engine's modules. Need CUDA."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType

from .attention_mask import check_mask, is_causal
from .post_norm import PostNorm


class MaskedTEDotProductAttention(TEDotProductAttention):  # type: ignore[misc]
    """``TEDotProductAttention`` that doesn't ignore its attention mask.

    With the mask type ``causal``, flash attention and cuDNN's kernel take no mask, so Transformer
    Engine drops it in 16 bits (but not in float32). Only its unfused attention takes a mask, of
    type ``arbitrary``, and combines it with the window; it stores the scores of all pairs of
    positions. Plainly causal masks still use the fast kernels.
    Source: ``get_attention_backend`` and ``get_full_mask`` of Transformer Engine 2.6 to 2.20,
    ``attention/dot_product_attention/utils.py``.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run TEDotProductAttention with the mask.

        Args:
            attention_mask: bool, [b or 1, 1, s, t], True where attention is not allowed. Packed
                sequences are masked by their lengths instead, as in megatron-core.

        Raises:
            InputError: the mask has the wrong shape or dtype.
        """
        if packed_seq_params is None and attention_mask is not None:
            check_mask(attention_mask, len(query), len(key))
            if attn_mask_type is AttnMaskType.causal and is_causal(attention_mask):
                attention_mask = None
            else:
                attn_mask_type = AttnMaskType.arbitrary
        return super().forward(  # type: ignore[no-any-return]
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias,
            packed_seq_params,
            **kwargs,
        )


class TERowParallelLinearPostLN(PostNorm, TERowParallelLinear):  # type: ignore[misc]
    """``RowParallelLinearPostLN`` built from Transformer Engine's modules.

    Parameter names are the same, so a checkpoint loads into either; the norm follows OLMo's order
    of operations too (the weight is applied in float32, before the cast).
    """

    norm = TENorm
