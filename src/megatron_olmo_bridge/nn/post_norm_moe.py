"""Mixture of experts followed by a norm, as in FlexOlmo."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer


class PostNormMoELayer(MoELayer):  # type: ignore[misc]
    """``MoELayer`` whose combined output is normalised by ``post_layernorm``."""

    def __init__(self, config: Any, *args: Any, norm: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Map hidden states [s, b, h] to the same shape; return None as the bias."""
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output), bias
