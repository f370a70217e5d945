"""AdamW's settings and step count in the common state of a Megatron checkpoint."""

from __future__ import annotations

import struct
from typing import Any

from megatron_olmo_bridge.errors import FormatError, InputError, UnsupportedError, quote
from megatron_olmo_bridge.formats.inert import Inert
from megatron_olmo_bridge.formats.torch_archive import array_of
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder

STATE = "optimizer.state."
"""Prefix of the keys of the state's tensors."""
SETTINGS = ("lr", "betas", "eps", "weight_decay")
RECORD = "olmo_bridge_run"
"""Key in the common state of what megatron-core doesn't record: which parameters decay, and the
state of OLMo-core's trainer."""


def optimizer_values(dist: TorchDistFolder) -> tuple[float, dict[str, Any]]:
    """Return the step of the bias correction, and the settings of AdamW.

    Raises:
        InputError: there is no optimizer state, or the parameter groups don't agree.
        UnsupportedError: the state depends on the layout that it was saved at.
        FormatError: the common state is damaged.
    """
    file = dist.common_file
    saved = dist.common.get("optimizer")
    if not isinstance(saved, dict):
        raise InputError(f"{dist.path}: has no optimizer state")
    if not any(key.startswith(STATE) for key in dist.tensors):
        raise UnsupportedError(
            f"{dist.path}: its optimizer state can only be loaded at the layout that it was saved "
            "at (dp_reshardable). Save it with checkpoint.fully_reshardable=all, in Megatron-LM "
            "with --dist-ckpt-optim-fully-reshardable."
        )
    steps: set[float] = set()
    settings: list[dict[str, Any]] = []
    for part in [value for key, value in saved.items() if isinstance(key, int)] or [saved]:
        inner = part.get("optimizer", part)
        if not isinstance(inner, dict) or not isinstance(inner.get("param_groups"), list):
            raise FormatError(f"{file}: its optimizer has no param_groups")
        state = inner.get("state")
        common_step = state.get("common_step") if isinstance(state, dict) else None
        for group in inner["param_groups"]:
            # A group may have a step too, which torch's AdamW doesn't advance.
            steps.add(_number(dist, group.get("step") if common_step is None else common_step))
            if group.get("wd_mult") != 0.0 or not settings:
                found = {name: group.get(name) for name in SETTINGS}
                settings.append({**found, "initial_lr": group.get("max_lr", found["lr"])})
    if len(steps) != 1:
        raise InputError(f"{file}: the steps of its optimizer are {quote(sorted(steps))}, not one")
    if any(other != settings[-1] for other in settings[1:]):
        raise InputError(f"{file}: its parameter groups have different settings")
    return steps.pop(), settings[-1]


def _number(dist: TorchDistFolder, value: Any) -> float:
    """Return a number that is stored plainly, or as a tensor in the archive of the common state."""
    if type(value) in (int, float):
        return float(value)
    if not isinstance(value, Inert):
        raise FormatError(f"{dist.common_file}: {quote(value)} is not a step")
    array = array_of(value, dist.common_file, str(dist.common_file))
    if array.shape != () or array.dtype != "float32":
        raise FormatError(f"{dist.common_file}: the step is a tensor of {array.dtype}")
    with array.file.open("rb") as file:
        file.seek(array.offset)
        return float(struct.unpack("<f", file.read(4))[0])
