"""The full-width query/key norm on one process; several ranks are in the functional tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.qk_norm import FullWidthRMSNorm, KRMSNorm, QRMSNorm

HEADS, HEAD_DIM = 8, 16
WIDTH = HEADS * HEAD_DIM


class Rank:
    """A tensor-parallel group, seen from one of its ranks."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def norm_on(rank: Rank, dtype: torch.dtype = torch.float32) -> QRMSNorm:
    config = SimpleNamespace(
        num_query_groups=HEADS,
        num_attention_heads=HEADS,
        tensor_model_parallel_size=rank.size(),
        params_dtype=dtype,
    )
    with patch.object(parallel_state, "get_tensor_model_parallel_group", lambda: rank):
        return QRMSNorm(config, HEAD_DIM)


def norms(dtype: torch.dtype) -> tuple[QRMSNorm, Any]:
    """Ours and transformers', with the same random weight."""
    torch.manual_seed(0)
    ours = norm_on(Rank(), dtype)
    torch.nn.init.uniform_(ours.weight, 0.5, 1.5)
    theirs = Olmo2RMSNorm(WIDTH, eps=1e-6).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_transformers(dtype: torch.dtype) -> None:
    ours, theirs = norms(dtype)
    x = torch.randn(5, 2, HEADS, HEAD_DIM).to(dtype).requires_grad_()
    flat = x.detach().flatten(-2).requires_grad_()
    gradient = torch.randn(5, 2, WIDTH).to(dtype)
    found, expected = ours(x), theirs(flat)
    assert found.shape == x.shape
    assert found.dtype is dtype
    torch.testing.assert_close(found.flatten(-2), expected)
    found.backward(gradient.view_as(found))
    expected.backward(gradient)
    torch.testing.assert_close(x.grad.flatten(-2), flat.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_variance_is_that_of_all_heads_together() -> None:
    ours, _ = norms(torch.float32)
    x = torch.randn(1, 1, HEADS, HEAD_DIM)
    x[..., 0, :] *= 100
    per_head = torch.nn.functional.rms_norm(x, (HEAD_DIM,)) * ours.weight.view(HEADS, HEAD_DIM)
    assert (ours(x) - per_head).abs().max() > 0.5
    one_heads_share = ours(x)[..., 1, :].abs().max()
    assert one_heads_share < 0.2, "a small head beside a large one must stay small"


def test_each_rank_uses_the_slice_of_its_heads() -> None:
    slices = [norm_on(Rank(r, 4)).heads for r in range(4)]
    assert slices == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]


@pytest.mark.parametrize("norm", [QRMSNorm, KRMSNorm])
def test_refuses_groups_that_cannot_be_shared_out(norm: type[FullWidthRMSNorm]) -> None:
    config = SimpleNamespace(
        num_query_groups=2, num_attention_heads=8, tensor_model_parallel_size=4
    )
    with pytest.raises(InputError, match=r"2 key/value heads .* over 4 tensor-parallel ranks"):
        norm(config, hidden_size=16)
