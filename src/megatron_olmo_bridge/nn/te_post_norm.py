"""Transformer Engine's row-parallel linear followed by a norm. Needs CUDA."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm, TERowParallelLinear
from megatron.core.transformer import TransformerConfig

from .post_norm import refuse_bias


class TERowParallelLinearPostLN(TERowParallelLinear):  # type: ignore[misc]
    """``RowParallelLinearPostLN`` built from Transformer Engine's modules.

    Parameter names are the same, so a checkpoint loads into either; the norm follows OLMo's order
    of operations too (the weight is applied in float32, before the cast).
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        refuse_bias(kwargs)
        self.post_layernorm = TENorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map x [s, b, input_size / TP] to [s, b, output_size], s / TP if sequence-parallel."""
        output, _ = super().forward(x)
        return self.post_layernorm(output), None
