"""Records of a run for its log: facts of the whole run, and one record per step."""

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
    """Total tokens so far."""
    loss: float
    """Mean loss over the global batch, in the run's ``loss_unit``."""
    z_loss: float
    """Weighted z-loss term; 0 if unused."""
    lr: float
    grad_norm: float
    """Gradient norm before clipping."""
    seconds: float
    """Duration of the step."""
    skipped: bool = False
    """True if the optimizer skipped the step."""


@dataclass(frozen=True)
class RunFacts:
    """Facts that hold for the whole run."""

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
    """Unit of every loss, for people; the perplexity is defined for nats per token only."""

    @property
    def has_perplexity(self) -> bool:
        """True if exp(loss) is a perplexity."""
        return self.loss_unit == NATS_PER_TOKEN

    @property
    def hardware(self) -> str:
        """Number and name of the devices: ``8 x NVIDIA H100 80GB HBM3``."""
        return f"{self.processes} x {self.device}" if self.processes > 1 else self.device

    @property
    def peak_flops(self) -> float | None:
        """Peak dense bfloat16 FLOP/s of all processes; None if unknown, or in a float32 run."""
        peak = peak_flops(self.device)
        if peak is None or self.config.get("train", {}).get("precision") == "float32":
            return None
        return peak * self.processes
