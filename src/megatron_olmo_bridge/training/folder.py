"""Ownership of a run's folder, so that two runs never share one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from megatron_olmo_bridge.errors import FormatError, InputError, OutputError
from megatron_olmo_bridge.formats.files import check_name
from megatron_olmo_bridge.formats.hf_folder import CONFIG
from megatron_olmo_bridge.formats.iterations import TRACKER, iteration_folders
from megatron_olmo_bridge.formats.plain_yaml import read_yaml
from megatron_olmo_bridge.storage.atomic import replace_file

from .config import ClassificationConfig, TrainingConfig
from .extension import Extension
from .recipes import as_dict

RUN_FILE = "run.yaml"
"""File in the run's folder with the resolved config."""
_MAY_CHANGE = {
    "name",
    "sources",
    "parallel",
    "checkpoint",
    "export",
    "evaluation",
    "logging",
    "train.micro_batch_size",
    "data.cache",
    "data.workers",
    "data.tokenizer",
}
"""Sections and fields that may change when a run is resumed."""
EXPORTS = {"export.hf": "step_*", "export.olmo_core": "step[0-9]*"}
"""Fields that name a folder for exports, with the pattern of the exports in it."""
_EXTENDS = {"train.steps", "schedule.end_step"}
"""Fields that may also change when a run is extended; see :mod:`.extension`."""
_DIFFERENCES = 8
"""Maximum number of differences in a message."""


def what_is_lost(config: TrainingConfig) -> str | None:
    """Describe what a run without a folder does not save; None if it has a folder."""
    if config.checkpoint.save is not None:
        return None
    weights = "" if config.export.hf else ", and the trained weights will be lost"
    return f"No checkpoint, log or report will be saved{weights}: set checkpoint.save=FOLDER"


def check_folders(config: TrainingConfig) -> Extension | None:
    """Check, without writing, that the run's folder is new or belongs to this run.

    Returns:
        The extension, if the folder's run was planned with fewer steps.

    Raises:
        InputError: the folder is another run's, or is where the weights come from.
        OutputError: it can't be written to, or the folder of the exports can't.
    """
    for field, output in config.output_folders.items():
        _check_not_the_source(field, output, config)
        _check_writable(field, output)
    folder = config.folder
    if folder is not None and (folder / RUN_FILE).is_file():
        before = _read(folder / RUN_FILE)
        extension = _check_same_run(folder, before, config)
        _check_exports(config, _flat(before))
        return extension
    _check_exports(config, {})
    if folder is None:
        return None
    if folder.exists() and (iteration_folders(folder) or (folder / TRACKER).exists()):
        raise InputError(
            f"{folder}: has checkpoints that no run of this command saved ({RUN_FILE} is not "
            f"there). Name another folder as checkpoint.save, and this one as init.checkpoint."
        )
    if (folder / CONFIG).exists():
        raise InputError(
            f"{folder}: is a Hugging Face checkpoint. Name another folder as checkpoint.save."
        )
    return None


def _check_exports(config: TrainingConfig, before: dict[str, Any]) -> None:
    """Raise InputError if exports would replace those of another run.

    Args:
        before: settings of this run by ``section.field``, if it is resumed.
    """
    for field, pattern in EXPORTS.items():
        folder, own = config.output_folders.get(field), before.get(field)
        if folder is None:
            continue
        if own is not None and folder.resolve() == Path(own).expanduser().resolve():
            continue
        if exports := sorted(path.name for path in folder.glob(pattern)):
            raise InputError(
                f"{field}={folder}: has exports of another run ({exports[0]}"
                f"{f' and {len(exports) - 1} more' if exports[1:] else ''}), which this one's "
                f"would replace. Name another folder as {field}."
            )


def _check_same_run(
    folder: Path, before: dict[str, Any], config: TrainingConfig
) -> Extension | None:
    differences = _differences(before, as_dict(config))
    old = _flat(before)
    steps = old.get("train.steps")
    extension = None
    if isinstance(steps, int) and steps < config.train.steps:
        extension = Extension(config, steps, old.get("schedule.end_step") or steps)
    if differences.keys() - (_EXTENDS if extension else set()):
        lines = list(differences.values())
        more = len(lines) - _DIFFERENCES
        shown = lines[:_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        text = "\n".join(f"  {line}" for line in shown)
        raise InputError(
            f"{folder}: is the folder of another run; this one differs in\n{text}\n"
            "Name another folder as checkpoint.save. To start from its weights, "
            f"add init.checkpoint={folder} (and init.optimizer=true). To extend the run, change "
            "train.steps alone, to more."
        )
    if extension:
        extension.check()
    return extension


def claim(config: TrainingConfig) -> None:
    """Write ``run.yaml`` into the run's folder.

    Raises:
        OutputError: it can't be written.
    """
    folder = config.folder
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / RUN_FILE, yaml.safe_dump(as_dict(config), sort_keys=False))
    except OSError as error:
        raise OutputError(
            f"checkpoint.save={folder}: can't be written: {error.strerror}"
        ) from error


def _check_not_the_source(field: str, folder: Path, config: TrainingConfig) -> None:
    for name in ("checkpoint", "hf"):
        value = getattr(config.init, name)
        if value is None:
            continue
        source = Path(value).expanduser().resolve()
        if source == folder.resolve() or folder.resolve() in source.parents:
            raise InputError(
                f"init.{name}={value} is in {field}={folder}: the output of the run "
                f"would mix with its source. Name another folder as {field}."
            )


def _check_writable(field: str, folder: Path) -> None:
    check_name(folder)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise OutputError(f"{field}={folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{field}={folder}: no permission to write into {there}")


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_yaml(file)
    except FormatError:
        values = None
    if not isinstance(values, dict):
        raise FormatError(
            f"{file}: damaged, so it is unknown which run this is. Name another folder as "
            "checkpoint.save, and this one as init.checkpoint."
        )
    return values


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return ``section.field: was X, is Y`` for each field in which the runs differ."""
    old, new = _flat(before), _flat(now)
    classification = ClassificationConfig() if before.get("classification") else None
    # A run that is older than a field was trained as with the field's default.
    old = _flat(as_dict(TrainingConfig(classification=classification))) | old
    return {
        name: f"{name}: was {old.get(name)}, is {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in _MAY_CHANGE)
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
