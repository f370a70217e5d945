"""Compare norms and cross entropy on several gloo processes with one process. Contains no tests."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig

from megatron_olmo_bridge.nn.cross_entropy import vocab_parallel_cross_entropy
from megatron_olmo_bridge.nn.post_norm import RowParallelLinearPostLN
from megatron_olmo_bridge.nn.qk_norm import KRMSNorm, QRMSNorm
from megatron_olmo_bridge.runtime.cpu import cpu_runtime

RANKS, SEQUENCE, BATCH = 2, 6, 2
HEADS, GROUPS, HEAD_DIM, HIDDEN = 8, 4, 16, 32


def config(**changes: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        layernorm_epsilon=1e-6,
        tensor_model_parallel_size=RANKS,
        **changes,
    )


def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
    """Sum a gradient over the ranks, as finalize_model_grads does for these parameters."""
    total = gradient.clone()
    dist.all_reduce(total)
    return total


def check_qk_norm(rank: int) -> None:
    for build, heads in ((QRMSNorm, HEADS), (KRMSNorm, GROUPS)):
        norm = build(config(), HEAD_DIM, eps=1e-6)
        torch.manual_seed(3)  # both ranks draw the same numbers from here on
        weight = torch.rand(heads * HEAD_DIM) + 0.5
        x, gradient = torch.randn(2, SEQUENCE, BATCH, heads, HEAD_DIM)
        # The ranks' sums of squares must differ, or a missing sum over the ranks would not show.
        x[..., : heads // 2, :] *= 3

        whole_x, whole_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        whole = torch.nn.functional.rms_norm(
            whole_x.flatten(-2), (heads * HEAD_DIM,), whole_weight, eps=1e-6
        ).view_as(x)
        whole.backward(gradient)

        norm.weight.data.copy_(weight)
        mine = x.chunk(RANKS, -2)[rank].clone().requires_grad_()
        output = norm(mine)
        output.backward(gradient.chunk(RANKS, -2)[rank])
        torch.testing.assert_close(output, whole.chunk(RANKS, -2)[rank])
        torch.testing.assert_close(mine.grad, whole_x.grad.chunk(RANKS, -2)[rank])
        torch.testing.assert_close(sum_over_ranks(norm.weight.grad), whole_weight.grad)


def check_post_norm(rank: int, sequence_parallel: bool) -> None:
    linear = RowParallelLinearPostLN(
        HIDDEN,
        HIDDEN,
        config=config(sequence_parallel=sequence_parallel),
        init_method=torch.nn.init.normal_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
    )
    torch.manual_seed(3)
    weight, gain = torch.randn(HIDDEN, HIDDEN), torch.rand(HIDDEN) + 0.5
    x, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN)

    whole_x, whole_weight, whole_gain = (t.clone().requires_grad_() for t in (x, weight, gain))
    whole = torch.nn.functional.rms_norm(
        torch.nn.functional.linear(whole_x, whole_weight), (HIDDEN,), whole_gain, eps=1e-6
    )
    whole.backward(gradient)

    linear.weight.data.copy_(weight.chunk(RANKS, 1)[rank])
    linear.post_layernorm.weight.data.copy_(gain)
    mine = x.chunk(RANKS, -1)[rank].clone().requires_grad_()
    output, _ = linear(mine)
    expected = whole.chunk(RANKS, 0)[rank] if sequence_parallel else whole
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.backward(gradient.chunk(RANKS, 0)[rank] if sequence_parallel else gradient)
    found = linear.post_layernorm.weight.grad
    if sequence_parallel:
        assert linear.post_layernorm.weight.sequence_parallel
        found = sum_over_ranks(found)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, whole_gain.grad, **near)
    torch.testing.assert_close(mine.grad, whole_x.grad.chunk(RANKS, -1)[rank], **near)
    torch.testing.assert_close(linear.weight.grad, whole_weight.grad.chunk(RANKS, 1)[rank], **near)


def check_cross_entropy(rank: int, ranks: int) -> None:
    vocabulary, columns = 11, 6  # the last of three ranks has only padding
    torch.manual_seed(3)
    logits = 3 * torch.randn(BATCH, SEQUENCE, ranks * columns)
    labels = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % vocabulary
    weight = torch.rand(BATCH, SEQUENCE)

    whole = logits[..., :vocabulary].clone().requires_grad_()
    losses = -whole.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    (weight * (losses + 0.1 * whole.logsumexp(-1).square())).sum().backward()
    gradient = torch.zeros_like(logits)
    gradient[..., :vocabulary] = whole.grad

    mine = logits.chunk(ranks, -1)[rank].clone().requires_grad_()
    found, log_sum_exp = vocab_parallel_cross_entropy(mine, labels, vocabulary)
    (weight * (found + 0.1 * log_sum_exp.square())).sum().backward()
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(log_sum_exp, whole.logsumexp(-1))
    torch.testing.assert_close(mine.grad, gradient.chunk(ranks, -1)[rank])


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with cpu_runtime():
        dist.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        if sys.argv[1] == "qk_norm":
            check_qk_norm(rank)
        elif sys.argv[1] == "cross_entropy":
            check_cross_entropy(rank, ranks)
        else:
            check_post_norm(rank, sequence_parallel=sys.argv[1] == "post_norm_sequence_parallel")
        dist.barrier()  # a rank that exits early would close the other's connection
        dist.destroy_process_group()
