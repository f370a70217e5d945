"""Watch the loss for spikes and for values that are not numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

from megatron_olmo_bridge.errors import TrainingStopped

from .config import StabilityConfig


@dataclass
class Watch:
    """Spike detector over the losses and gradient norms of the last steps.

    Source of ``skip``: OLMo-core's ``SkipStepOptimizer``, which skips a step whose loss or gradient
    norm is more than ``sigma`` standard deviations above the mean of the ``window`` steps before.
    It starts with step ``window // 2``, itself counted: the 64th of the usual 128.

    Attributes:
        losses, norms: of the last steps, skipped ones among them, the newest last.
    """

    settings: StabilityConfig

    def __post_init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.settings.window)
        self.norms: deque[float] = deque(maxlen=self.settings.window)

    @property
    def may_skip(self) -> bool:
        return self.settings.on_spike == "skip"

    def check(self, step: int, loss: float) -> None:
        """Look at a step's loss before the weights are changed by it.

        Raises:
            TrainingStopped: it is not a number, or spiked and ``on_spike`` is ``stop``.
        """
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"the loss of step {step} is {loss}. The weights were not changed by it. Start "
                "again from the last checkpoint with a smaller optimizer.lr, or with "
                "stability.on_spike=skip."
            )
        if self.settings.on_spike == "stop" and self._above(self.losses, loss):
            raise TrainingStopped(
                f"the loss spiked to {loss:.3f} at step {step}: more than {self.settings.sigma:g} "
                f"standard deviations above {fmean(self.losses):.3f}, the mean of the last "
                f"{len(self.losses)} steps. The weights were not changed by it. Start again from "
                "the last checkpoint with stability.on_spike=skip or =ignore, or with a smaller "
                "optimizer.lr."
            )

    def is_spike(self, loss: float, norm: float) -> bool:
        """Return whether a step is to be skipped."""
        return not math.isfinite(norm) or (
            self._above(self.losses, loss) or self._above(self.norms, norm)
        )

    def remember(self, step: int, loss: float, norm: float, skipped: bool) -> None:
        """Add a step that is over.

        Raises:
            TrainingStopped: the gradient was not a number, and the weights are spoilt.
        """
        if not math.isfinite(norm) and not skipped:
            raise TrainingStopped(
                f"the gradient of step {step} is not a number, though the loss is {loss:.3f}. "
                "Start again from the last checkpoint, with stability.on_spike=skip."
            )
        self.losses.append(loss)
        if math.isfinite(norm):
            self.norms.append(norm)

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint keeps."""
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Take over what :meth:`state` returned."""
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])

    def _above(self, seen: Iterable[float], value: float) -> bool:
        last = list(seen)
        # A deviation takes two steps (OLMo-core skips for lack of one: its deviation is NaN).
        if len(last) < 2 or len(last) + 1 < self.settings.window // 2:
            return False
        return value > fmean(last) + self.settings.sigma * stdev(last)
