"""Jobs that run live models in processes of their own; the caller needs no megatron-core."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_olmo_bridge.runtime.devices import NO_TF32
from megatron_olmo_bridge.runtime.launch import processes

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final norm", "logits"
"""Names of states other than ``layer 0``, ``layer 1``, ..."""
TOKEN = "token "
"""Prefix of an output line with a generated token."""
STEP = "step "
"""Prefix of an output line that names the next step."""
Tell = Callable[[str], None]
"""Called with each step as it begins."""

JOB = "OLMO_BRIDGE_JOB"
"""Variable with the job, for its processes."""
_WORKER = "megatron_olmo_bridge.inference"


@dataclass(frozen=True)
class Job:
    """A checkpoint, a layout, and what to do with the live model."""

    checkpoint: str
    """Folder of a checkpoint of any kind, or its address."""
    tp: int = 1
    pp: int = 1
    sp: bool = False
    ep: int = 1
    dtype: str = "keep"
    tokens: list[list[int]] = field(default_factory=list)
    """Token ids to run on, [b, s]; to generate, a single prompt."""
    states: str | None = None
    """If set, run the tokens and write logits and hidden states to this folder."""
    save: str | None = None
    """If set, save the model as this Megatron checkpoint."""
    generate: dict[str, Any] | None = None
    """If set, generate with these options of :func:`inference.generate.generate`."""

    def started(self) -> AbstractContextManager[Iterator[str]]:
        """Return a context in which the processes run; it yields their output, line by line.

        TF32 is disabled, as float32 results are compared.
        """
        count = self.tp * self.pp * self.ep
        # Not an argument: all users of a machine see those, and an address may hold a password.
        environment = NO_TF32 | {JOB: json.dumps(asdict(self))}
        return processes(_WORKER, [], count, environment=environment)

    def run(self, tell: Tell = lambda _: None) -> None:
        """Run the processes to their end.

        Raises:
            BridgeError: the error that one of them ended with.
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
    """Return the logits and hidden states that a job's processes wrote, by name."""
    states: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("stage-*.safetensors")):
        states |= load_file(file)
    return states
