"""Interface between the training loop and a task: batches, loss and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from .token_data import Batch

Sums = dict[str, torch.Tensor]
"""Sums over what was scored; ``loss`` and ``weight`` are among them, and ``loss / weight`` is the
mean. Any further tensors are added up over micro-batches and data-parallel ranks too."""
Score = Callable[[torch.Tensor], tuple[torch.Tensor, Sums]]
"""Takes the last stage's output; returns the loss to minimise (a mean), and sums."""


class Task(Protocol):
    """A kind of training; the loop knows nothing else of it."""

    loss_unit: str
    """Unit of the loss, for people."""
    tokenizer_folder: Path | None
    """The tokenizer's files, which are kept with every checkpoint and export."""

    def train_batches(self, begin: int) -> Iterator[Batch]:
        """Yield this process's micro-batches, beginning with those of step ``begin`` (from 1)."""

    def validation_batches(self) -> Iterator[Batch] | None:
        """Yield this process's micro-batches of held-out data, always the same; None for none."""

    @property
    def validation_micro_batches(self) -> int:
        """Number of these micro-batches."""

    def trainer_state(self, step: int) -> dict[str, Any] | None:
        """Return the state of OLMo-core's trainer after a step; None for data in another order."""
        return None

    def forward(self, chunk: Any, batch: Batch) -> tuple[torch.Tensor, Score]:
        """Run a chunk of the model; the second value scores the output of the last stage."""

    def evaluated(self, step: int, sums: Sums) -> tuple[dict[str, float], bool]:
        """Return an evaluation's measures by name, ``loss`` among them, and whether to stop now."""
