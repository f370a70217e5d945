"""Detect spikes of the loss, and losses and gradients that are not finite."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, stdev

from megatron_olmo_bridge.errors import TrainingStopped

from .config import StabilityConfig


@dataclass
class Watch:
    """Spike detector over the losses and gradient norms of the last steps.

    Source of ``skip``: OLMo-core's ``SkipStepOptimizer``, which skips a step whose loss or gradient
    norm is more than ``sigma`` standard deviations above the mean of the preceding ``window``
    steps. The first step that it checks is number ``window // 2``.
    """

    settings: StabilityConfig

    def __post_init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.settings.window)
        """Losses of the last steps, including skipped ones; the newest is last."""
        self.norms: deque[float] = deque(maxlen=self.settings.window)
        """Finite gradient norms of the last steps, including skipped ones; the newest is last."""

    @property
    def may_skip(self) -> bool:
        return self.settings.on_spike == "skip"

    def check(self, step: int, loss: float) -> None:
        """Check a step's loss, before the step changes the weights.

        Raises:
            TrainingStopped: the loss is not finite, or it spiked and ``on_spike`` is ``stop``.
        """
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"the loss of step {step} is {loss}. The weights were not changed by it. Start "
                "again from the last checkpoint with a smaller optimizer.lr, or with "
                "stability.on_spike=skip."
            )
        if self.settings.on_spike == "stop" and self._is_above(self.losses, loss):
            raise TrainingStopped(
                f"the loss spiked to {loss:.3f} at step {step}: more than {self.settings.sigma:g} "
                f"standard deviations above {fmean(self.losses):.3f}, the mean of the last "
                f"{len(self.losses)} steps. The weights were not changed by it. Start again from "
                "the last checkpoint with stability.on_spike=skip or =ignore, or with a smaller "
                "optimizer.lr."
            )

    def is_spike(self, loss: float, norm: float) -> bool:
        """Return whether a step with this loss and gradient norm is to be skipped."""
        return (
            not math.isfinite(norm)
            or self._is_above(self.losses, loss)
            or self._is_above(self.norms, norm)
        )

    def remember(self, step: int, loss: float, norm: float, skipped: bool) -> None:
        """Add a finished step to the window.

        Raises:
            TrainingStopped: the gradient norm is not finite and the step was taken, so that the
                weights are lost.
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
        """Return the window, to be saved in a checkpoint."""
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Set the window to a saved :meth:`state`."""
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])

    def _is_above(self, recent: deque[float], value: float) -> bool:
        # A deviation needs two steps. (OLMo-core skips the second step, whose deviation is NaN.)
        if len(recent) < 2 or len(recent) + 1 < self.settings.window // 2:
            return False
        return value > fmean(recent) + self.settings.sigma * stdev(recent)
