"""AdamW's settings and step count in the common state of a Megatron checkpoint."""

from __future__ import annotations

from typing import Any

from megatron_olmo_bridge.errors import FormatError, InputError, UnsupportedError, quote
from megatron_olmo_bridge.formats.inert import Inert
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.torch_archive import array_of, read_number
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder

from .optimizer_values import DECAYED, check_settings, check_trainer

STATE = "optimizer.state."
"""Prefix of the keys of the state's tensors."""
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
    # A chain of optimizers, one for experts for example, has them by number.
    parts = [value for key, value in saved.items() if isinstance(key, int)] or [saved]
    groups = [group for part in parts for group in _groups(part, file)]
    steps = {_number(dist, group.get("step")) for group in groups}
    if len(steps) != 1:
        raise InputError(f"{file}: the steps of its optimizer are {quote(sorted(steps))}, not one")
    decaying = [group for group in groups if group.get("wd_mult") != 0.0] or groups
    settings = [
        check_settings({**group, "initial_lr": group.get("max_lr", group.get("lr"))}, file)
        for group in decaying
    ]
    if any(other != settings[0] for other in settings):
        raise InputError(f"{file}: its parameter groups have different settings")
    return steps.pop(), settings[0]


def _groups(part: Any, file: AnyPath) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, each with its step."""
    inner = part.get("optimizer", part) if isinstance(part, dict) else None
    inner = inner if isinstance(inner, dict) else {}
    groups, state = inner.get("param_groups"), inner.get("state")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise FormatError(f"{file}: its optimizer has no param_groups")
    if isinstance(state, dict) and (step := state.get("common_step")) is not None:
        # A group may have a step too, which torch's AdamW doesn't advance.
        return [{**group, "step": step} for group in groups]
    return groups


def read_iteration(dist: TorchDistFolder) -> int:
    """Return the number of optimizer steps that the run has taken.

    Raises:
        FormatError: the common state has something else in its place.
    """
    iteration = dist.common.get("iteration", 0)
    if type(iteration) is not int or iteration < 0:
        raise FormatError(f"{dist.common_file}: iteration is {quote(iteration)}, not a number")
    return iteration


def read_record(dist: TorchDistFolder) -> tuple[str, dict[str, Any] | None]:
    """Return which parameters decay, and the state of OLMo-core's trainer if there is one.

    Raises:
        FormatError: the record is damaged.
    """
    file, record = dist.common_file, dist.common.get(RECORD) or {}
    if not isinstance(record, dict) or record.get("decayed", "matrices") not in DECAYED:
        raise FormatError(f"{file}: {RECORD} is {quote(record)}, which this package doesn't write")
    trainer = record.get("trainer")
    trainer = None if trainer is None else check_trainer(trainer, file)
    return record.get("decayed", "matrices"), trainer


def _number(dist: TorchDistFolder, value: Any) -> float:
    """Return a number that is stored plainly, or as a tensor in the archive of the common state."""
    if type(value) in (int, float):
        return float(value)
    if not isinstance(value, Inert):
        raise FormatError(f"{dist.common_file}: {quote(value)} is not a step")
    where = f"{dist.common_file}: the step of its optimizer"
    return read_number(array_of(value, dist.common_file, where), where)
