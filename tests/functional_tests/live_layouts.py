"""Layouts, tokens and steps shared by ``live_model.py`` and the tests that run it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from launching import run_script
from safetensors.torch import load_file

VOCABULARY = 1024
"""Tokens of olmo2-tiny."""
BATCH = (4, 32)
"""Rows and columns."""
HALF_BATCH = (2, 256)
"""Tokens for the bfloat16 tests: hundreds, so that mean and maximum errors are meaningful."""
SEEN = 64
"""Upper bound of token ids in training batches: the loss falls, other rows get no gradient."""
STEPS, ROWS, COLUMNS = 5, 8, 32
LEARNING_RATE, DECAY, BETAS, EPSILON, CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0
MUTANTS = ("rank-local variance", "plain all_reduce", "sharded weight")
"""Wrong QK norms that ``live_model.py`` can substitute for the correct one."""


# --------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a model."""

    processes: int
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields to set on the provider."""
    model: str = "plain"
    """Folder in the fixture ``models``: ``plain`` or ``tied``."""
    then: str = ""
    """Another layout of the same world size that loads the checkpoint saved at this one."""

    @property
    def tensor(self) -> int:
        return self.fields.get("tensor_model_parallel_size", 1)

    @property
    def data(self) -> int:
        """Number of processes that hold copies of the same weights and divide the batch."""
        pipeline = self.fields.get("pipeline_model_parallel_size", 1)
        return self.processes // (self.tensor * pipeline)


TP2, TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
PP2, SP = {"pipeline_model_parallel_size": 2}, {"sequence_parallel": True}
LAYOUTS = {
    "tp1": Layout(1, then="tp1"),
    "tp2": Layout(2, TP2, then="pp2"),
    "tp2-sp": Layout(2, TP2 | SP, then="pp2-vpp2"),
    "tp4": Layout(4, TP4, then="tp2-pp2"),
    "tp4-sp": Layout(4, TP4 | SP, then="tp2-pp2-sp"),
    "pp2": Layout(2, PP2, then="tp2"),
    "tp2-pp2": Layout(4, TP2 | PP2, then="tp4-sp"),
    "tp2-pp2-sp": Layout(4, TP2 | PP2 | SP, then="tp4"),
    "pp2-vpp2": Layout(2, PP2 | {"virtual_pipeline_model_parallel_size": 2}, then="pp2-uneven"),
    "pp2-uneven": Layout(2, PP2 | {"num_layers_in_first_pipeline_stage": 1}, then="tp2-sp"),
    "tp2-padded": Layout(2, TP2 | {"make_vocab_size_divisible_by": 768}, then="pp2"),
    "pp2-tied": Layout(2, PP2, "tied", then="tp2"),
    "dp2": Layout(2, then="tp2"),
}


SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def sizes(fields: dict[str, Any]) -> tuple[int, ...]:
    """Return a provider's parallel sizes; models with equal sizes can share process groups."""
    return tuple(fields.get(name) or 0 for name in SIZES)


# ------------------------------------------------------------------------------- tokens, tensors


def random_tokens(rows: int, columns: int) -> torch.Tensor:
    """Return a random batch, the same in every process."""
    return torch.randint(VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


def training_tokens() -> torch.Tensor:
    """Return a batch for each step: [STEPS, ROWS, COLUMNS]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(SEEN, (STEPS, ROWS, COLUMNS), generator=generator)


def labels_of(tokens: torch.Tensor) -> torch.Tensor:
    """Return the next token at each position, and the first token at the last: all count."""
    return tokens.roll(-1, dims=1)


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and bits."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of the expected tensor."""
    return float((found - expected).norm() / expected.norm())


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """Return the largest error and its name. NaN counts as the largest, which max() could miss."""
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return name, errors[name]


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a Hugging Face folder by name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def stored_names(folder: Path) -> list[str]:
    """Return the tensor names of a Hugging Face folder in the order of its files."""
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__", None)
        names += sorted(header, key=lambda name: header[name]["data_offsets"])
    return names


# ----------------------------------------------------------------------------------------- steps

Step = dict[str, Any]
"""Arguments for one function of ``live_model.py``, which ``action`` names."""


def run_live(steps: list[Step], processes: int) -> None:
    """Run the steps one after the other with ``live_model.py``."""
    print(run_script("live_model", json.dumps(steps, default=str), processes=processes))


def step(action: str, hf: Path, layout: str, out: Path, **options: Any) -> Step:
    """Return the step that does an action on a model at a layout and saves results into ``out``."""
    fields = LAYOUTS[layout].fields
    return {"action": action, "hf": hf, "fields": fields, "out": out, **options}


def steps_of(layout: str, models: Path, root: Path) -> list[Step]:
    """Return the steps that run at every layout."""
    hf, out = models / LAYOUTS[layout].model, root / layout
    return [
        step("logits", hf, layout, out, batch=BATCH),
        step("gradients", hf, layout, out, batch=BATCH),
        step("roundtrip", hf, layout, out),
        reload_step(models, out, LAYOUTS[layout].then),
    ]


def reload_step(models: Path, saved: Path, layout: str) -> Step:
    """Return the step that loads the checkpoint in ``saved`` into another layout."""
    hf, megatron = models / LAYOUTS[saved.name].model, saved / "megatron"
    return step("reload", hf, layout, saved / f"in-{layout}", megatron=megatron)


def train_steps(layout: str, models: Path, root: Path) -> list[Step]:
    """Return the steps that train without and with the distributed optimizer."""
    hf = models / "plain"
    return [
        step("train", hf, layout, root / f"train-{layout}", distributed_optimizer=False),
        step("train", hf, layout, root / f"train-{layout}-distributed", distributed_optimizer=True),
    ]
