"""Cross entropy and log-sum-exp against torch's own, on one process."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import ModelParallelConfig

from megatron_olmo_bridge.nn.cross_entropy import vocab_parallel_cross_entropy
from megatron_olmo_bridge.runtime.process_groups import ensure_process_groups

VOCABULARY = 11


@pytest.fixture(autouse=True)
def groups(one_process: None) -> None:
    ensure_process_groups(ModelParallelConfig())


def example(dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, 5, columns], and labels [2, 5] with the first and the last token among them."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 5, columns, generator=generator)
    labels = torch.randint(VOCABULARY, (2, 5), generator=generator)
    labels[0, 0], labels[1, 1] = 0, VOCABULARY - 1
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_values_and_gradients_are_torchs(dtype: torch.dtype, padding: int, z_loss: float) -> None:
    logits, labels = example(dtype, VOCABULARY + padding)
    weight = torch.linspace(0.5, 2, 10).view(2, 5)  # a gradient of its own for every position
    tokens = logits.detach().float().requires_grad_()

    loss, log_sum_exp = vocab_parallel_cross_entropy(logits, labels, VOCABULARY)
    (weight * (loss + z_loss * log_sum_exp.square())).sum().backward()

    real = tokens[..., :VOCABULARY]
    expected = torch.nn.functional.cross_entropy(
        real.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(2, 5)
    (weight * (expected + z_loss * real.logsumexp(-1).square())).sum().backward()
    assert loss.dtype == log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_sum_exp, real.logsumexp(-1))
    assert logits.grad is not None and tokens.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, tokens.grad.to(dtype))


def test_padding_has_no_probability_whatever_its_logits() -> None:
    logits, labels = example(torch.float32, VOCABULARY + 5)
    before = vocab_parallel_cross_entropy(logits, labels, VOCABULARY)
    with torch.no_grad():
        logits[..., VOCABULARY:] = 1000.0

    loss, log_sum_exp = vocab_parallel_cross_entropy(logits, labels, VOCABULARY)
    (loss + log_sum_exp).sum().backward()

    torch.testing.assert_close((loss, log_sum_exp), before)
    assert logits.grad is not None
    assert not logits.grad[..., VOCABULARY:].any()


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss, log_sum_exp = vocab_parallel_cross_entropy(logits, torch.tensor([1]), 3)
    loss.sum().backward()
    assert loss.tolist() == [2e4] and log_sum_exp.tolist() == [1e4]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_the_logits_are_not_changed() -> None:
    logits, labels = example(torch.float32, VOCABULARY + 5)
    before = logits.detach().clone()
    sum(vocab_parallel_cross_entropy(logits, labels, VOCABULARY)).sum().backward()
    assert torch.equal(logits, before)
