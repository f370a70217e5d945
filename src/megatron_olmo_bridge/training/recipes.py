"""Recipes: Python functions that return a run's config, and overrides of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_olmo_bridge.errors import BridgeError, InputError, nearest
from megatron_olmo_bridge.formats.files import RECIPE_LIMIT, read_small

from .config import ClassificationConfig, TrainingConfig
from .named_recipes import recipe_files

DEFAULT = "config"
"""Name of a recipe's default function."""
OVERRIDDEN = "command line"
"""Source of an overridden field."""
_FREE = ("model", "provider", "sources")
"""Sections with keys that are not this package's to list; ``model`` has those of the recipe."""


def load_recipe(name: str) -> TrainingConfig:
    """Return the config of a recipe.

    Args:
        name: a name such as ``olmo2_1b``, or a file; ``:FUNCTION`` may follow either.

    Raises:
        InputError: there is no such recipe or function, or it returns something else.
    """
    name_or_file, _, function = name.partition(":")
    path = _file(name_or_file)
    module = _module(path)
    make = getattr(module, function or DEFAULT, None)
    if not callable(make):
        known = [n for n, v in vars(module).items() if _is_recipe(v, module)]
        raise InputError(
            f"{path}: has no function {function or DEFAULT!r}"
            f"{nearest(function or DEFAULT, known)}; it has {', '.join(known) or 'none'}"
        )
    try:
        config = make()
    except BridgeError:
        raise
    except Exception as error:
        raise InputError(f"{name}: the recipe fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainingConfig):
        raise InputError(f"{name}: returns a {type(config).__name__}, not a TrainingConfig")
    return config


def _file(name: str) -> Path:
    files, path = recipe_files(), Path(name)
    if name in files:
        return files[name]
    if not path.is_file():
        raise InputError(
            f"{name}: no such recipe{nearest(path.stem, files) or '.'} `olmo-bridge recipes` lists "
            "those that have a name; your own is named by its file, FILE.py"
        )
    read_small(path, RECIPE_LIMIT)
    return path


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: a recipe is a Python file, FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # for what recipes of a folder share
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # would go by whole seconds
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: can't be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
        sys.dont_write_bytecode = bytecode
    return module


def _is_recipe(value: Any, module: ModuleType) -> bool:
    name = getattr(value, "__name__", "_")
    return getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")


def apply_overrides(config: TrainingConfig, overrides: Sequence[str]) -> TrainingConfig:
    """Return the config with ``section.field=value`` applied in order; values are read as YAML.

    Raises:
        InputError: no such field (the nearest is named), or a value of another type.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r}: an override reads section.field=value")
        values = _with(values, key.strip(), text)
        values["sources"][key.strip()] = OVERRIDDEN
    return from_dict({str(key): value for key, value in values.items()})


def from_dict(values: dict[str, Any]) -> TrainingConfig:
    """Return the config that :func:`as_dict` returned the values of.

    Raises:
        InputError: a value is of another type than its field.
    """
    try:
        schema = OmegaConf.structured(TrainingConfig)
        made = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(made, TrainingConfig)
    return made


def as_dict(config: TrainingConfig) -> dict[str, Any]:
    """Return the config as nested plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _with(values: dict[Any, Any], key: str, text: str) -> dict[Any, Any]:
    """Return the values with one set; outside of free sections, the key must exist."""
    section, _, rest = key.partition(".")
    known = field_names(TrainingConfig)
    if section in _FREE and rest:
        known = [f"{section}.{name}" for name in values[section]]
        if section == "model" and values[section] and key not in known:
            raise InputError(f"no field {key!r} in the model's config{nearest(key, known)}")
    elif key not in known:
        raise InputError(
            f"no field {key!r}{nearest(key, known)} (`--dry-run` shows all of a recipe's)"
        )
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        if _is_list(key) and value is not None and not OmegaConf.is_list(value):
            value = [value]  # one path is a list of one
        container = OmegaConf.create(values)
        OmegaConf.update(container, key, value, merge=False, force_add=True)
    except UnicodeEncodeError as error:
        raise InputError(f"{key}={text}: is not UTF-8") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise InputError(f"{key}={text}: {str(error).splitlines()[0]}") from error
    updated = OmegaConf.to_container(container)
    assert isinstance(updated, dict)
    return updated


def field_names(section_class: Any, prefix: str = "") -> list[str]:
    """Return every ``section.field`` of a config class."""
    names: list[str] = []
    sections = {f.name: f.default_factory for f in fields(section_class)} | {
        "classification": ClassificationConfig
    }
    for f in fields(section_class):
        section = sections[f.name]
        if prefix == "" and is_dataclass(section):
            names += field_names(section, f"{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def _is_list(key: str) -> bool:
    section, _, name = key.partition(".")
    of = next((f.default_factory for f in fields(TrainingConfig) if f.name == section), None)
    if not is_dataclass(of):
        return False
    return any(f.name == name and str(f.type).startswith("list") for f in fields(of))
