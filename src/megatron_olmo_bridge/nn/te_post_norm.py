"""Transformer Engine's row-parallel linear followed by a norm. Needs CUDA."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TENorm, TERowParallelLinear

from .post_norm import PostNorm


class TERowParallelLinearPostLN(PostNorm, TERowParallelLinear):  # type: ignore[misc]
    """``RowParallelLinearPostLN`` built from Transformer Engine's modules.

    Parameter names are the same, so a checkpoint loads into either; the norm follows OLMo's order
    of operations too (the weight is applied in float32, before the cast).
    """

    norm = TENorm
