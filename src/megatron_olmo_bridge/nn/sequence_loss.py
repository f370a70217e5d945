"""Losses of a classification head for each problem type."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from megatron_olmo_bridge.errors import InputError

from .problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL


def sequence_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str | None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of each sequence, [b] of float32; their mean is the loss of transformers.

    Source: ``ForSequenceClassificationLoss`` of transformers.

    Args:
        logits: [b, num_labels].
        labels: single-label: classes [b], int32 or int64; the loss of -100 is 0.
            Multi-label: [b, num_labels], 1 for each class that applies, else 0.
            Regression: [b, num_labels], or [b] if num_labels is 1.
        problem_type: one of :data:`.problem_types.PROBLEM_TYPES`; None infers it from the number
            of logits and the dtype of the labels.
        class_weights: [num_labels], for single-label losses only.

    Raises:
        InputError: the shape or dtype of the labels doesn't match the problem type.
    """
    logits = logits.float()
    integers = labels.dtype in (torch.int32, torch.int64)
    if problem_type is not None:
        kind = problem_type
    elif logits.shape[1] == 1:
        kind = REGRESSION
    else:
        kind = SINGLE_LABEL if integers else MULTI_LABEL
    if kind == SINGLE_LABEL:
        if labels.numel() != len(logits) or not integers:
            raise InputError(
                f"labels of {labels.dtype} and shape {list(labels.shape)}: {kind} takes the index "
                f"of a class for each of the {len(logits)} sequences"
            )
        classes = labels.reshape(-1).long()
        return cross_entropy(logits, classes, weight=class_weights, reduction="none")
    if logits.shape[1] == 1 and labels.ndim == 1 and kind == REGRESSION:
        labels = labels[:, None]
    if labels.shape != logits.shape:
        raise InputError(
            f"labels of shape {list(labels.shape)}: {kind} takes {list(logits.shape)}, as the "
            "logits are"
        )
    loss = mse_loss if kind == REGRESSION else binary_cross_entropy_with_logits
    return loss(logits, labels.float(), reduction="none").mean(1)
