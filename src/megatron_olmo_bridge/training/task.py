"""What is learned: where batches come from, and how a model scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.utils import unwrap_model

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.cross_entropy import vocab_parallel_cross_entropy

from .config import TrainingConfig
from .monitor.run_log import NATS_PER_TOKEN
from .token_data import Batch, MicroBatches, TokenData

Sums = dict[str, torch.Tensor]
"""Sums over what was scored; ``loss`` and ``weight`` are among them, and ``loss / weight`` is the
mean. Any further tensors are added up over micro-batches and data-parallel ranks too."""
Score = Callable[[torch.Tensor], tuple[torch.Tensor, Sums]]
"""From the last stage's output to the loss to minimise (a mean over the micro-batch), and sums."""


class Task(Protocol):
    """A kind of training; the loop knows nothing else of it."""

    loss_unit: str
    """Unit of the loss, for people."""

    def train_batches(self, begin: int) -> Iterator[Batch]:
        """This process's micro-batches, from a step (from 1) on."""

    def validation_batches(self) -> Iterator[Batch] | None:
        """This process's micro-batches of held-out data, the same ones each time; None for none."""

    @property
    def validation_micro_batches(self) -> int:
        """How many they are."""

    def forward(self, chunk: Any, batch: Batch) -> tuple[torch.Tensor, Score]:
        """Run a chunk of the model; the second value scores the output of the last stage."""

    def evaluated(self, step: int, sums: Sums) -> tuple[dict[str, float], bool]:
        """Figures of an evaluation, by name, ``loss`` among them; and whether to stop now."""


@dataclass
class LanguageModelling(Task):
    """The next token, at every position."""

    config: TrainingConfig
    data: TokenData
    vocab_size: int
    micro_batches: int
    """Of a step, in this process."""
    loss_unit: str = NATS_PER_TOKEN

    def train_batches(self, begin: int) -> Iterator[Batch]:
        train = self.config.train
        return iter(MicroBatches(self.data.train, train, self.config.data.workers, begin))

    def validation_batches(self) -> Iterator[Batch] | None:
        if self.data.validation is None:
            return None
        return iter(MicroBatches(self.data.validation, self.config.train, 0))

    @property
    def validation_micro_batches(self) -> int:
        return self.config.evaluation.batches * self.micro_batches

    def forward(self, chunk: Any, batch: Batch) -> tuple[torch.Tensor, Score]:
        _check_tokens(batch, self.vocab_size)
        device = torch.cuda.current_device()
        tokens, labels, positions = (
            batch[name].to(device, non_blocking=True)
            for name in ("tokens", "labels", "position_ids")
        )
        unwrap_model(chunk).compute_language_model_loss = self._losses
        output = chunk(tokens, positions, None, labels=labels)

        def score(losses: torch.Tensor) -> tuple[torch.Tensor, Sums]:
            loss, log_sum_exp = losses
            z_loss = self.config.optimizer.z_loss * log_sum_exp.square()
            return (loss + z_loss).mean(), {
                "loss": loss.detach().sum(),
                "z_loss": z_loss.detach().sum(),
                "weight": loss.new_full((), loss.numel()),
            }

        return output, score

    def _losses(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """In the place of GPTModel's own: cross entropy and log-sum-exp, [2, s, b], of labels
        [b, s] and logits [s, b, padded vocabulary / TP]. Given no labels, GPTModel would copy the
        logits to return them."""
        return torch.stack(vocab_parallel_cross_entropy(logits, labels.T, self.vocab_size))

    def evaluated(self, step: int, sums: Sums) -> tuple[dict[str, float], bool]:
        return {"loss": float(sums["loss"] / sums["weight"])}, False


def _check_tokens(batch: Batch, vocab_size: int) -> None:
    """Refuse what the model has no embedding for: a GPU would only report an assertion.

    Raises:
        InputError: a token beyond the vocabulary.
    """
    for name in ("tokens", "labels"):
        least, most = (int(token) for token in batch[name].aminmax())
        if least < 0 or most >= vocab_size:
            raise InputError(
                f"the data have token {least if least < 0 else most}, the model has {vocab_size}: "
                "they were prepared with another tokenizer. Prepare them with the model's, or set "
                "model.vocab_size."
            )
