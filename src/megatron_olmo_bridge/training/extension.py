"""Extending a run: more steps, in the folder of a run that was planned with fewer.

Completed steps stay as they are. Two things depend on the number of steps: the learning rate, where
the schedule ends with the run, and the order of the data, once it is read more than once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_olmo_bridge.data.info import read_info
from megatron_olmo_bridge.errors import InputError

from .config import TrainingConfig

_SURPLUS = 1.005
"""megatron-core asks each of several data sets for this multiple of its share of the samples
(``mid_level_dataset_surplus``)."""
_SEPARATE = 0.8
"""A last epoch of which less than this share is read is shuffled by itself
(``GPTDataset._build_document_sample_shuffle_indices``)."""


@dataclass(frozen=True)
class Extension:
    """A run's config, and the steps that it was planned with."""

    config: TrainingConfig
    planned_steps: int
    planned_end: int
    """The step at which the planned schedule ends."""

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def check(self) -> None:
        """Refuse an extension that leaves the learning rate ambiguous.

        Raises:
            InputError: the schedule would end at another step, and ``schedule.end_step`` is not
                set.
        """
        schedule, planned = self.config.schedule, self.planned_end
        if schedule.decay == "constant" or schedule.end_step:
            return
        minimum = self.config.optimizer.lr * schedule.min_lr_ratio
        raise InputError(
            f"train.steps={self.steps} extends a run of {self.planned_steps} steps, whose learning "
            f"rate ({schedule.decay}) was to reach its minimum at step {planned}. Say what it is "
            "to be from here on:\n"
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
        """Return what determines the order of the data: per path, the number of epochs and whether
        the last one is shuffled by itself."""
        data, train = self.config.data, self.config.train
        info = [read_info(Path(prefix)) for prefix in data.path]
        shares = data.weights or [float(i.tokens) for i in info]
        orders = []
        for tokens, share in zip((i.tokens for i in info), shares, strict=True):
            wanted = math.ceil(steps * train.global_batch_size * share / sum(shares))
            samples = math.ceil(wanted * _SURPLUS) if len(info) > 1 else wanted
            epochs = -(-(samples * train.sequence_length + 1) // tokens)
            before = ((epochs - 1) * tokens - 1) // train.sequence_length
            share_read = (samples - before) / ((tokens - 1) // train.sequence_length)
            orders.append((epochs, epochs > 1 and share_read < _SEPARATE))
        return orders
