"""Jobs that run live models in separate processes; this process needs no megatron-core."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_olmo_bridge.runtime.devices import NO_TF32
from megatron_olmo_bridge.runtime.launch import processes

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final norm", "logits"
"""Names of states beside ``layer 0`` and so on."""
TOKEN = "token "
"""Begins a line of standard output that holds a generated token."""
STEP = "step "
"""Begins a line that says what the processes do next."""
Tell = Callable[[str], None]
"""Called with each step as it begins."""

_WORKER = "megatron_olmo_bridge.inference"


@dataclass(frozen=True)
class Job:
    """Checkpoint, layout, and what to do with the model."""

    checkpoint: str
    """A Hugging Face folder or a Megatron checkpoint."""
    tp: int = 1
    pp: int = 1
    sp: bool = False
    ep: int = 1
    dtype: str = "keep"
    tokens: list[list[int]] = field(default_factory=list)
    """A batch to run, [b, s]; or, to generate, one prompt."""
    states: str | None = None
    """Folder for the logits and hidden states of the batch."""
    save: str | None = None
    """Megatron checkpoint to write."""
    generate: dict[str, Any] | None = None
    """Options of :func:`inference.generate.generate`."""

    def started(self) -> Any:
        """Return a context manager that starts the processes and yields their output.

        TF32 is off: their float32 is compared with other float32.
        """
        count = self.tp * self.pp * self.ep
        return processes(_WORKER, [json.dumps(asdict(self))], count, environment=NO_TF32)

    def run(self, tell: Tell = lambda _: None) -> None:
        """Start the processes and wait for them.

        Raises:
            BridgeError: what went wrong in one of them.
        """
        tell(self.starting)
        with self.started() as output:
            for line in output:
                if line.startswith(STEP):
                    tell(line.removeprefix(STEP).rstrip())

    @property
    def starting(self) -> str:
        """Description of the first step."""
        count = self.tp * self.pp * self.ep
        return f"start {count} process{'es' * (count > 1)} of megatron-core"


def read_states(folder: Path) -> dict[str, torch.Tensor]:
    """Read the logits and hidden states that a job's processes wrote."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("stage-*.safetensors")):
        found |= load_file(file)
    return found
