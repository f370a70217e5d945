"""Cross entropy of logits whose vocabulary is sharded over tensor-parallel ranks.

megatron-core's cross entropy counts padding rows of the vocabulary as tokens, and doesn't return
the log-sum-exp that the z-loss needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross entropy and log-sum-exp of every position, both differentiable.

    Args:
        logits: [..., padded vocabulary / TP], this rank's rows of the vocabulary; any dtype.
        labels: [...], token ids; the same on all tensor-parallel ranks.
        vocab_size: number of rows that are tokens; the rest is padding with zero probability.

    Returns:
        Two tensors [...], float32, in nats; the same on all ranks.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    loss, log_sum_exp = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, labels, vocab_size, group
    )
    return loss, log_sum_exp


class _CrossEntropy(torch.autograd.Function):
    """One pass over the logits in each direction; ranks exchange one number per position."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = logits.shape[-1]
        first = columns * dist.get_rank(group)
        scores = logits.float()
        if first + columns > vocab_size:
            real = max(0, vocab_size - first)
            # Not -inf: on a rank with padding alone the softmax would be NaN.
            scores = scores.clone()
            scores[..., real:] = torch.finfo(torch.float32).min
        logp = scores.log_softmax(-1)
        local = scores[..., 0] - logp[..., 0]  # log-sum-exp over this rank's columns
        top = _all_reduce(local, dist.ReduceOp.MAX, group)
        total = top + _all_reduce((local - top).exp(), dist.ReduceOp.SUM, group).log()
        inside = (labels >= first) & (labels < first + columns)
        index = torch.where(inside, labels - first, 0).unsqueeze(-1)
        if dist.get_world_size(group) > 1:
            logp += (local - total).unsqueeze(-1)  # normalised over the columns of all ranks
        target = torch.where(inside, logp.gather(-1, index).squeeze(-1), 0.0)
        ctx.save_for_backward(logp, index, inside)
        ctx.dtype = logits.dtype
        return -_all_reduce(target, dist.ReduceOp.SUM, group), total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None, None]:
        logp, index, inside = ctx.saved_tensors
        loss_grad, total_grad = grads
        grad = logp.exp().mul_((loss_grad + total_grad).unsqueeze(-1))
        grad.scatter_add_(-1, index, (-loss_grad * inside).unsqueeze(-1))
        return grad.to(ctx.dtype), None, None, None


def _all_reduce(x: torch.Tensor, operation: Any, group: Any) -> torch.Tensor:
    if dist.get_world_size(group) == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, operation, group)
    return x
