"""The losses of a classification head, against those of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.sequence_loss import sequence_losses

REGRESSION, SINGLE, MULTI = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
CLASSES = torch.tensor([2, 0, 1, 1])
SEVERAL = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
VALUES = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, 1.5], [-0.5, 0.25, 0.0], [1.0, 1.0, -2.0]])
ONE_VALUE = VALUES[:, :1]

CASES = [
    (SINGLE, 3, CLASSES),
    (SINGLE, 3, CLASSES.int()),
    (MULTI, 3, SEVERAL.float()),
    (MULTI, 1, SEVERAL[:, :1].float()),
    (REGRESSION, 1, ONE_VALUE),
    (REGRESSION, 1, ONE_VALUE[:, 0]),
    (REGRESSION, 3, VALUES),
    # Inferred, as transformers does.
    (None, 3, CLASSES),
    (None, 3, SEVERAL.float()),
    (None, 1, ONE_VALUE[:, 0]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("problem_type", "count", "labels"), CASES)
def test_loss_and_gradients_are_those_of_transformers(
    problem_type: str | None, count: int, labels: torch.Tensor, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    values = torch.randn(len(labels), count, dtype=dtype)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    losses = sequence_losses(ours, labels, problem_type)
    assert losses.shape == (len(labels),)
    losses.mean().backward()

    if labels.is_floating_point():
        labels = labels.to(dtype)
    config = SimpleNamespace(num_labels=count, problem_type=problem_type)
    expected_labels = labels.long() if labels.dtype == torch.int32 else labels
    loss = ForSequenceClassificationLoss(expected_labels, theirs, config)
    loss.backward()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # transformers computes it in bfloat16
    torch.testing.assert_close(losses.mean(), loss.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_whole_numbers_are_values_and_flags_too() -> None:
    logits = torch.randn(4, 3)
    flags, same = (sequence_losses(logits, labels, MULTI) for labels in (SEVERAL, SEVERAL.float()))
    assert torch.equal(flags, same)
    values = sequence_losses(logits[:, :1], CLASSES, REGRESSION)
    assert torch.equal(values, (logits[:, 0] - CLASSES).square())


def test_single_labels_take_class_weights() -> None:
    logits, weights = torch.randn(4, 3), torch.tensor([0.5, 1.0, 2.0])
    weighted = sequence_losses(logits, CLASSES, SINGLE, weights)
    assert torch.allclose(weighted, sequence_losses(logits, CLASSES, SINGLE) * weights[CLASSES])


@pytest.mark.parametrize(
    ("problem_type", "count", "labels", "message"),
    [
        (SINGLE, 3, SEVERAL, r"shape \[4, 3\]: single_label_classification takes the index"),
        (SINGLE, 3, CLASSES.float(), "labels of torch.float32"),
        (MULTI, 3, CLASSES.float(), r"shape \[4\]: multi_label_classification takes \[4, 3\]"),
        (REGRESSION, 3, ONE_VALUE, r"shape \[4, 1\]: regression takes \[4, 3\]"),
        (REGRESSION, 1, ONE_VALUE[:2, 0], r"shape \[2, 1\]: regression takes \[4, 1\]"),
    ],
)
def test_labels_of_another_shape_are_refused(
    problem_type: str, count: int, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sequence_losses(torch.randn(4, count), labels, problem_type)
