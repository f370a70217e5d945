"""RMSNorm, and the row-parallel linear with a norm after it: the post-norm block of OLMo-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig


def scale_by_rms(
    x: torch.Tensor, mean_square: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """``weight * x / sqrt(mean_square + eps)``, all in float32: the caller casts the result.

    OLMo's order of operations: the weight is applied before the cast (Llama casts first). Source:
    ``Olmo2RMSNorm.forward`` of transformers.

    Args:
        x: float32, any shape. Cast once for this and for the mean square: of two casts the
            gradients would be rounded one by one.
        mean_square: float32, broadcastable to x.
        weight: any dtype, broadcastable to x.
    """
    return weight.float() * (x * torch.rsqrt(mean_square + eps))


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, also under sequence parallelism.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism. There each rank sees a part
    of the sequence, so that the weight's gradients have to be summed over the ranks; megatron-core
    does this for parameters that say ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., hidden_size]; same shape and dtype."""
        wide = x.float()
        mean_square = wide.pow(2).mean(-1, keepdim=True)
        return scale_by_rms(wide, mean_square, self.weight, self.eps).to(x.dtype)


def refuse_bias(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for the arguments of a linear that has a bias: megatron-core would add it
    after the norm."""
    if kwargs["bias"]:
        raise ValueError("a linear with a norm after it cannot have a bias")


class RowParallelLinearPostLN(RowParallelLinear):  # type: ignore[misc]
    """Row-parallel linear whose output, after the reduction over the ranks, is normalised.

    Stands where megatron-core expects ``linear_proj`` or ``linear_fc2``; the norm is the child
    ``post_layernorm``. The linear must be without bias.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        refuse_bias(kwargs)
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [s, b, input_size / TP] to [s, b, output_size] (s / TP under sequence parallelism)."""
        output, _ = super().forward(x)
        return self.post_layernorm(output), None
