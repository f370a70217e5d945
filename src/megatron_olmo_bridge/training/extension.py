"""Extend a run: train more steps than were planned, in the same folder.

Completed steps stay as they are. Two things depend on the planned number of steps: the learning
rate, if the schedule ends with the run, and the order of data that is read more than once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_olmo_bridge.data.info import read_info
from megatron_olmo_bridge.errors import InputError

from .config import TrainingConfig

_SURPLUS = 1.005
"""Factor by which megatron-core's blend asks each data set for more samples than its share
(``mid_level_dataset_surplus``)."""
_SEPARATE_BELOW = 0.8
"""Share of the last epoch: if less is read, megatron-core shuffles that epoch by itself
(``GPTDataset._build_document_sample_shuffle_indices``)."""


@dataclass(frozen=True)
class Extension:
    """Config of the extended run, and the plan that it extends."""

    config: TrainingConfig
    planned_steps: int
    planned_end: int
    """Step at which the planned schedule ends."""

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def check(self) -> None:
        """Check that the learning rate of the further steps is defined.

        Raises:
            InputError: the schedule ends with the run, and ``schedule.end_step`` is not set.
        """
        schedule, planned = self.config.schedule, self.planned_end
        if schedule.decay == "constant" or schedule.end_step:
            return
        minimum = self.config.optimizer.lr * schedule.min_lr_ratio
        raise InputError(
            f"train.steps={self.steps} extends a run of {self.planned_steps} steps, whose learning "
            f"rate ({schedule.decay}) was to reach its minimum at step {planned}. Choose the rate "
            "of the further steps:\n"
            f"  schedule.end_step={planned}: as planned; the steps after {planned} are taken at "
            f"the minimum, {minimum:g}\n"
            f"  schedule.end_step={self.steps}: as in a run of {self.steps} steps; it continues "
            "at the rate that such a run has at this step"
        )

    def message(self) -> str:
        """Describe the extension in words.

        Raises:
            BridgeError: the data can't be read.
        """
        schedule = self.config.schedule
        end = schedule.end_step or self.steps
        if schedule.decay == "constant":
            rate = "the learning rate is constant"
        elif end == self.planned_end:
            rate = f"the learning rate is as planned, at its minimum from step {end} on"
        else:
            rate = f"the learning rate is from here on that of a schedule that ends at step {end}"
        order = ""
        if self._order(self.steps) != self._order(self.planned_steps):
            order = (
                "; the data is read more often than planned, and from here on in another order: "
                "some sequences come back sooner than in a run of as many steps from the start"
            )
        return f"from {self.planned_steps} to {self.steps} steps; {rate}{order}"

    def _order(self, steps: int) -> list[tuple[int, bool]]:
        """Return what determines the order of the data of a run with this number of steps.

        For each path: the number of epochs, and whether the last one is shuffled by itself.
        """
        data, train = self.config.data, self.config.train
        tokens_of_paths = [read_info(Path(prefix)).tokens for prefix in data.path]
        weights = data.weights or [float(tokens) for tokens in tokens_of_paths]
        order = []
        for tokens, weight in zip(tokens_of_paths, weights, strict=True):
            samples = math.ceil(steps * train.global_batch_size * weight / sum(weights))
            if len(weights) > 1:
                samples = math.ceil(samples * _SURPLUS)
            epochs = -(-(samples * train.sequence_length + 1) // tokens)
            before_last = ((epochs - 1) * tokens - 1) // train.sequence_length
            share_read = (samples - before_last) / ((tokens - 1) // train.sequence_length)
            order.append((epochs, epochs > 1 and share_read < _SEPARATE_BELOW))
        return order
