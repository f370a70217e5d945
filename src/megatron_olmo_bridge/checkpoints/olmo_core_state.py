"""Optimizer state and progress in a training checkpoint of OLMo-core."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from megatron_olmo_bridge.errors import FormatError, InputError, UnsupportedError, quote
from megatron_olmo_bridge.formats.dcp_folder import DCPFolder
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.torch_archive import read_archive
from megatron_olmo_bridge.models.olmo_core_names import EMBEDDING

from .optimizer_values import SETTINGS, check_settings, check_trainer

WEIGHTS = "model."
STATE = "optim.state."
GROUPS = "optim.param_groups."
"""Prefixes of keys. The name of a weight follows; in older checkpoints the number of a parameter
group follows the last of them."""
MOMENTS = ("exp_avg", "exp_avg_sq")
PROGRESS = PurePosixPath("train/rank0.pt")
"""File with the progress of the run, which each rank writes."""
_NO_EFFECT = (
    "params",
    "decoupled_weight_decay",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)


def optimizer_values(folder: DCPFolder) -> tuple[float, dict[str, Any], str]:
    """Return the step of the bias correction, the settings of AdamW, and what it decays.

    Raises:
        InputError: a tensor is absent, or the parameters' steps or settings differ.
        UnsupportedError: the state is of another optimizer than AdamW and SkipStepAdamW.
        FormatError: a file is damaged.
    """
    names = sorted(folder.select(WEIGHTS).tensors)
    expected = {f"{name}.{kind}" for name in names for kind in (*MOMENTS, "step")}
    present = folder.select(STATE).tensors.keys()
    if not present:
        raise InputError(f"{folder.path}: has no optimizer state")
    if unknown := sorted(present - expected):
        raise UnsupportedError(
            f"{folder.path}: has {STATE}{unknown[0]}, which is not part of the state of AdamW or "
            "SkipStepAdamW, the only optimizers whose state is converted"
        )
    if absent := sorted(expected - present):
        raise InputError(f"{folder.path}: its optimizer state doesn't have {STATE}{absent[0]}")
    steps = {name: folder.number(f"{STATE}{name}.step") for name in names}
    settings, spared = _settings(folder)
    return _common_value("step", steps, folder), settings, _decayed(names, spared, folder)


def _settings(folder: DCPFolder) -> tuple[dict[str, Any], set[str]]:
    """Return ``SETTINGS``, and the parameters, or numbers of groups, without weight decay."""
    values: dict[str, dict[str, Any]] = {}
    # A compiled optimizer has its learning rate in tensors.
    for key in (*folder.objects, *folder.tensors):
        if key.startswith(GROUPS):
            group, _, name = key.removeprefix(GROUPS).rpartition(".")
            value = folder.object(key) if key in folder.objects else folder.number(key)
            values.setdefault(name, {})[group] = value
    decays = values.get("weight_decay", {})
    values["weight_decay"] = {k: v for k, v in decays.items() if v != 0} or decays
    settings = {}
    for name, by_group in values.items():
        if name in SETTINGS:
            settings[name] = _common_value(name, by_group, folder)
        elif name not in _NO_EFFECT and any(by_group.values()):
            raise UnsupportedError(
                f"{folder.path}: its optimizer sets {name}, which AdamW under Megatron doesn't have"
            )
    if absent := [name for name in SETTINGS if name not in settings]:
        raise InputError(f"{folder.path}: {GROUPS}* doesn't have {absent[0]}")
    settings = check_settings(settings, folder.path)
    spared = {name for name, decay in decays.items() if decay == 0}
    if settings["weight_decay"] == 0:
        return settings, set()
    if any(name.isdecimal() for name in decays):
        spared = {p for group in spared for p in values.get("params", {}).get(group, ())}
    return settings, spared


def _decayed(names: list[str], spared: set[str], folder: DCPFolder) -> str:
    """Return the value of the training option ``optimizer.decayed``."""
    if not spared:
        return "all"
    if spared == {EMBEDDING}:
        return "all_but_embeddings"
    if spared == {name for name in names if "norm" in name}:
        return "matrices"
    raise UnsupportedError(
        f"{folder.path}: {len(spared)} parameters have no weight decay, such as {min(spared)}; "
        "the state is only converted if all parameters decay, or all but the embeddings, or only "
        "the matrices"
    )


def _common_value(what: str, values: Mapping[str, Any], folder: DCPFolder) -> Any:
    """Return the value that all parameters have.

    Raises:
        InputError: they have different values; megatron-core keeps one for all.
    """
    (first, value), *others = values.items()
    for name, other in others:
        if other != value:
            raise InputError(
                f"{folder.path}: the {what} of {first} is {quote(value)}, that of {name} is "
                f"{quote(other)}; Megatron's optimizer keeps one for all parameters"
            )
    return value


def read_progress(path: AnyPath) -> tuple[int, dict[str, Any]]:
    """Return the number of optimizer steps that the run has taken, and the trainer's state.

    Raises:
        InputError: there is no file of the first rank.
        FormatError: the file doesn't say, or is damaged.
    """
    file = path / PROGRESS
    if not file.exists():
        raise InputError(
            f"{path}: no {PROGRESS}: it says how many steps the run has taken. Fetch it too; "
            "without optimizer state it is not needed."
        )
    progress = read_archive(file)
    step = progress.get("global_step") if isinstance(progress, dict) else None
    if type(step) is not int or step < 0:
        raise FormatError(f"{file}: global_step is {quote(step)}, not a number of steps")
    return step, check_trainer(progress, file)
