"""Classification task: micro-batches of texts, and their loss and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_olmo_bridge.nn.sequence_loss import sequence_losses
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.task import Score, Sums, Task
from megatron_olmo_bridge.training.token_data import Batch

from .data import Tokenized, samples
from .problems import Problem, problem_of
from .stopping import Evaluation, out_of_patience

NO_TEXT = -1
"""Index that stands for a row that pads a batch."""
_MULTIPLE = 8
"""Multiple that sequences are padded to; efficient on tensor cores."""


@dataclass
class Classification(Task):
    """Text classification.

    Each evaluation scores all held-out texts, regardless of ``evaluation.batches``.
    """

    config: TrainingConfig
    classes: tuple[str, ...]
    training: Tokenized
    held_out: Tokenized
    pad_token_id: int
    weights: torch.Tensor | None = None
    """Class weights of a single-label loss, [classes], float32."""
    history: list[Evaluation] = field(default_factory=list)
    """Evaluations so far."""
    tokenizer_folder: Path | None = None
    on_evaluated: Callable[[], None] = lambda: None
    """Called in all processes after an evaluation is added to the history."""
    problem: Problem = field(init=False)
    loss_unit: str = field(init=False)

    def __post_init__(self) -> None:
        assert self.config.classification is not None
        self.problem = problem_of(self.config.classification)
        self.loss_unit = self.problem.loss_unit
        if self.weights is not None:
            self.weights = self.weights.to(torch.cuda.current_device())

    def train_batches(self, begin: int) -> Iterator[Batch]:
        train = self.config.train
        size, step = train.global_batch_size, begin - 1
        while True:
            global_batch = samples(train.seed, len(self.training), step * size, size)
            yield from self._micro_batches(self.training, global_batch)
            step += 1

    def validation_batches(self) -> Iterator[Batch]:
        count = self.validation_micro_batches * self._at_once
        padded = [i if i < len(self.held_out) else NO_TEXT for i in range(count)]
        return self._micro_batches(self.held_out, padded)

    @property
    def validation_micro_batches(self) -> int:
        count = math.ceil(len(self.held_out) / self._at_once)
        # The interleaved schedule needs a multiple of the number of pipeline stages.
        multiple = self.config.parallel.pp if self.config.parallel.vpp else 1
        return math.ceil(count / multiple) * multiple

    @property
    def _at_once(self) -> int:
        """Number of texts in one micro-batch of all data-parallel ranks."""
        ranks: int = parallel_state.get_data_parallel_world_size()
        return self.config.train.micro_batch_size * ranks

    def forward(self, chunk: Any, batch: Batch) -> tuple[torch.Tensor, Score]:
        device = torch.cuda.current_device()
        tokens, labels, counted = (
            batch[n].to(device, non_blocking=True) for n in ("tokens", "labels", "counted")
        )
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        # Causal attention needs no mask for padding on the right.
        output = chunk(tokens, positions, None)

        def score(logits: torch.Tensor) -> tuple[torch.Tensor, Sums]:
            kind = self.problem.problem_type
            losses = sequence_losses(logits, labels, kind, self.weights) * counted
            predictions = self.problem.predictions(logits.detach())[counted]
            return losses.mean(), {
                "loss": losses.detach().sum(),
                "weight": counted.sum(),
                **self.problem.counts(labels[counted], predictions, len(self.classes)),
            }

        return output, score

    def evaluated(self, step: int, sums: Sums) -> tuple[dict[str, float], bool]:
        measures = self.problem.quality(sums, self.classes).measures
        figures = {"loss": float(sums["loss"] / sums["weight"]), **measures}
        # A resumed run repeats the evaluations that followed its last checkpoint.
        self.history[:] = [e for e in self.history if e.step < step]
        self.history.append(Evaluation(step, measures[self.problem.score]))
        self.on_evaluated()
        return figures, out_of_patience(self.history, self.patience)

    @property
    def patience(self) -> int | None:
        """Early-stopping patience, in evaluations."""
        return self.config.classification.patience if self.config.classification else None

    def _micro_batches(self, data: Tokenized, indices: list[int]) -> Iterator[Batch]:
        """Yield this process's micro-batches, dealt round-robin to the data-parallel ranks."""
        micro = self.config.train.micro_batch_size
        ranks = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        for first in range(rank * micro, len(indices), ranks * micro):
            rows = indices[first : first + micro]
            texts = [max(i, 0) for i in rows]
            tokens = data.padded(texts, self._length(data, texts), self.pad_token_id)
            yield {
                "tokens": torch.from_numpy(tokens),
                "labels": torch.from_numpy(data.labels[texts]),
                "counted": torch.tensor([i != NO_TEXT for i in rows]),
            }

    def _length(self, data: Tokenized, indices: list[int]) -> int:
        """Return the length to pad to: that of the longest text, or with PP the full length."""
        full, parallel = self.config.train.sequence_length, self.config.parallel
        if parallel.pp > 1:
            return full
        multiple = math.lcm(_MULTIPLE, parallel.tp)
        longest = max(len(data.row(i)) for i in indices)
        return min(full, math.ceil(longest / multiple) * multiple)
