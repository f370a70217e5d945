"""What a run logs: a record of the whole run, and one of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .gpu_peaks import peak_flops

NATS_PER_TOKEN = "nats per token"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Number of the step, from 1."""
    tokens: int
    """Seen so far, in all."""
    loss: float
    """Mean loss over the global batch, in the run's ``loss_unit``."""
    z_loss: float
    """The z-loss term, weighted; 0 without."""
    lr: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    """Duration of the step."""
    skipped: bool = False
    """The optimizer did not take the step."""


@dataclass(frozen=True)
class RunFacts:
    """What holds for the whole run."""

    name: str
    steps: int
    """Optimizer steps of the whole run."""
    tokens_per_step: int
    parameters: int
    flops_per_token: float
    """FLOPs of forward and backward pass, without what recomputation adds."""
    processes: int
    device: str
    """``CPU``, or the GPU's name as torch gives it."""
    config: dict[str, Any]
    """The resolved config: nested plain values."""
    versions: dict[str, str]
    loss_unit: str = NATS_PER_TOKEN
    """Unit of every loss, for people; a perplexity exists for nats per token only."""

    @property
    def has_perplexity(self) -> bool:
        """Whether exp(loss) is a perplexity."""
        return self.loss_unit == NATS_PER_TOKEN

    @property
    def hardware(self) -> str:
        """``8 x NVIDIA H100 80GB HBM3``"""
        return f"{self.processes} x {self.device}" if self.processes > 1 else self.device

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s of all processes.

        None where that is not known, and in a float32 run, which it says nothing about.
        """
        peak = peak_flops(self.device)
        if peak is None or self.config.get("train", {}).get("precision") == "float32":
            return None
        return peak * self.processes
