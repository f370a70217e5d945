"""A run's folder: what says whose it is, so that two runs never mix in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.torch_dist import TRACKER, iteration_folders

from .config import TrainingConfig
from .recipes import as_dict

RUN_FILE = "run.yaml"
"""The resolved config, in the run's folder."""
_MAY_CHANGE = {
    "name", "sources", "parallel", "checkpoint", "export", "evaluation", "logging",
    "train.micro_batch_size", "data.cache", "data.workers", "data.tokenizer",
    "classification.baseline",
}  # fmt: skip
"""Sections and fields in which a run that continues may differ from what it was."""


def claim(config: TrainingConfig) -> Path | None:
    """Look whether the run's folder is new or this run's own, and write ``run.yaml`` into it.

    Returns:
        The folder; None if the run has none.

    Raises:
        InputError: the folder is another run's, or is where the weights come from.
    """
    if config.checkpoint.save is None:
        return None
    folder = Path(config.checkpoint.save).expanduser()
    _not_the_source(folder, config)
    values = as_dict(config)
    file = folder / RUN_FILE
    if file.is_file():
        if differences := _differences(_read(file), values):
            lines = "\n".join(f"  {line}" for line in differences)
            raise InputError(
                f"{folder}: is the folder of another run; this one differs in\n{lines}\n"
                "Name another folder as checkpoint.save. To go on from what was trained there, "
                f"add init.checkpoint={folder} (and init.optimizer=true)."
            )
    elif folder.exists() and (iteration_folders(folder) or (folder / TRACKER).exists()):
        raise InputError(
            f"{folder}: has checkpoints that no run of this command saved ({RUN_FILE} is not "
            f"there). Name another folder as checkpoint.save, and this one as init.checkpoint."
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(values, sort_keys=False))
    partial.replace(file)
    return folder


def _not_the_source(folder: Path, config: TrainingConfig) -> None:
    for field in ("checkpoint", "hf"):
        given = getattr(config.init, field)
        if given is None:
            continue
        source = Path(given).expanduser().resolve()
        if source == folder.resolve() or folder.resolve() in source.parents:
            raise InputError(
                f"init.{field}={given} is in checkpoint.save={folder}: what comes out of a run "
                "would mix with what goes into it. Name another folder as checkpoint.save."
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{file}: can't be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``section.field: was X, is Y`` for everything in which the runs are not the same."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name}: was {old.get(name)}, is {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
        and not any(name == other or name.startswith(f"{other}.") for other in _MAY_CHANGE)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
