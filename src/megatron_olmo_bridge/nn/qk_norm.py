"""RMSNorm of queries and keys over the full width of the projection, under tensor parallelism.

OLMo-2 normalises the whole output of q_proj (and of k_proj) before it is split into heads.
megatron-core calls ``q_layernorm`` and ``k_layernorm`` after the split, with this rank's heads
only, and builds them at the width of one head. So these modules take the full width from the
config, sum the squares over the ranks, and hold the full weight, of which each rank uses the slice
for its heads.

The weight is deliberately replicated, not sharded: megatron-core sums the gradients of parameters
named q_layernorm and k_layernorm over the tensor-parallel ranks (``finalize_model_grads``), which
is right for this one, and a checkpoint holds one plain tensor of the full width at any layout.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.post_norm import scale_by_rms


class _SumOverRanks(torch.autograd.Function):
    """All-reduce, forward and backward.

    Every rank uses the total, so the gradient of one rank's summand is the sum of the ranks'
    gradients of the total.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad_outputs[0].clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class FullWidthRMSNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor-parallel ranks, of which this rank holds some in order.

    Args:
        config: numbers of heads over all ranks, and the dtype of the weight.
        hidden_size: width of one head.

    Raises:
        InputError: The heads cannot be divided evenly over the ranks.
    """

    heads_field: ClassVar[str]
    """Field of the config with the number of heads."""
    widens: ClassVar[bool] = False
    """Return the result, rounded to the input's dtype, as float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        if config.num_query_groups % config.tensor_model_parallel_size:
            raise InputError(
                f"{config.num_query_groups} key/value heads cannot be divided evenly over "
                f"{config.tensor_model_parallel_size} tensor-parallel ranks"
            )
        super().__init__()
        self.num_heads: int = getattr(config, self.heads_field)
        self.head_dim, self.eps = hidden_size, eps
        self.group = parallel_state.get_tensor_model_parallel_group()
        local_heads = self.num_heads // self.group.size()
        self.heads = slice(self.group.rank() * local_heads, (self.group.rank() + 1) * local_heads)
        width = self.num_heads * self.head_dim
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [s, b, num_heads / TP, head_dim]; same shape, same dtype (see ``widens``)."""
        wide = x.float()
        sum_of_squares = wide.pow(2).sum((-2, -1), keepdim=True)
        if self.group.size() > 1:
            sum_of_squares = _SumOverRanks.apply(sum_of_squares, self.group)  # type: ignore[no-untyped-call]
        mean_square = sum_of_squares / (self.num_heads * self.head_dim)
        weight = self.weight.view(self.num_heads, self.head_dim)[self.heads]
        out = scale_by_rms(wide, mean_square, weight, self.eps).to(x.dtype)
        return out.float() if self.widens else out


class QRMSNorm(FullWidthRMSNorm):
    """``q_layernorm``, over all query heads."""

    heads_field = "num_attention_heads"


class KRMSNorm(FullWidthRMSNorm):
    """``k_layernorm``, over all key heads."""

    heads_field = "num_query_groups"


class WideningQRMSNorm(QRMSNorm):
    """``q_layernorm`` for a core attention that casts queries and keys itself, after rope.

    megatron-core's unfused rope rounds sines and cosines to the dtype of its input. Given float32,
    it rotates in float32, as transformers does.
    """

    widens = True


class WideningKRMSNorm(KRMSNorm):
    """``k_layernorm`` like :class:`WideningQRMSNorm`."""

    widens = True
