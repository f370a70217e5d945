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
    """RMSNorm over ``num_heads * head_dim`` elements, of which this rank holds some heads.

    Args:
        num_heads: number of heads over all ranks.
        head_dim: width of one head.
        group: tensor-parallel ranks, which hold the heads in order.
    """

    widens = False
    """Return the result, rounded to the input's dtype, as float32."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.eps, self.group = num_heads, head_dim, eps, group
        local_heads = num_heads // group.size()
        self.heads = slice(group.rank() * local_heads, (group.rank() + 1) * local_heads)
        self.weight = torch.nn.Parameter(torch.ones(num_heads * head_dim, dtype=dtype))

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
    """``q_layernorm`` as megatron-core builds it: ``hidden_size`` is the width of one head.

    Raises:
        InputError: The heads cannot be divided evenly over the tensor-parallel ranks.
    """

    heads_field: ClassVar[str] = "num_attention_heads"
    """Field of the config with the number of heads over all ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        if config.num_query_groups % config.tensor_model_parallel_size:
            raise InputError(
                f"{config.num_query_groups} key/value heads cannot be divided evenly over "
                f"{config.tensor_model_parallel_size} tensor-parallel ranks"
            )
        heads = getattr(config, self.heads_field)
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(heads, hidden_size, eps, config.params_dtype, group)


class KRMSNorm(QRMSNorm):
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
