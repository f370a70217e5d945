"""RMSNorm, and the row-parallel linear with a norm after it: the post-norm block of OLMo-2."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig


def scale_by_rms(
    x: torch.Tensor, mean_square: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return ``weight * x / sqrt(mean_square + eps)`` in float32; the caller casts it.

    OLMo applies the weight before the cast (Llama casts first). Source:
    ``Olmo2RMSNorm.forward`` of transformers.

    Args:
        x: float32, any shape. Use one cast for x and for the mean square: with two, their gradients
            would be rounded separately.
        mean_square: float32, broadcastable to x.
        weight: any dtype, broadcastable to x.
    """
    return weight.float() * (x * torch.rsqrt(mean_square + eps))


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, also under sequence parallelism.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism, under which each rank sees a
    part of the sequence and the weight's gradients must be summed over the ranks; megatron-core
    does this for parameters marked ``sequence_parallel``.
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


class PostNorm:
    """Base of row-parallel linears whose output, after the reduction over the ranks, is normalised.

    They replace ``linear_proj`` or ``linear_fc2``; the norm is the child ``post_layernorm``.

    Raises:
        ValueError: the linear has a bias, which megatron-core would add after the norm.
    """

    norm: ClassVar[Any]

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)  # type: ignore[call-arg]
        if kwargs["bias"]:
            raise ValueError("a linear with a norm after it cannot have a bias")
        self.post_layernorm = self.norm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map x [s, b, input_size / TP] to [s, b, output_size], s / TP if sequence-parallel."""
        output, _ = super().forward(x)  # type: ignore[misc]
        return self.post_layernorm(output), None


class RowParallelLinearPostLN(PostNorm, RowParallelLinear):  # type: ignore[misc]
    """Row-parallel linear followed by :class:`RMSNorm`."""

    norm = RMSNorm
