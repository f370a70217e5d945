"""LayerNorm with and without weights, also under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import layer_norm


class LayerNorm(torch.nn.Module):
    """LayerNorm over the last dimension, with gain and bias: GPT-2's.

    Like :class:`~megatron_olmo_bridge.nn.post_norm.RMSNorm`, marks its parameters as
    ``sequence_parallel``, which megatron-core's ``WrappedTorchNorm`` refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., hidden_size]; same shape and dtype."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class WeightlessLayerNorm(torch.nn.Module):
    """LayerNorm over the last dimension, in float32, without gain or bias: OLMo's.

    Source: ``OlmoLayerNorm`` of transformers.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., hidden_size]; same shape and dtype."""
        return layer_norm(x.float(), (self.hidden_size,), eps=self.eps).to(x.dtype)
