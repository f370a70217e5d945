"""Recipes: Python functions that return a run's config, and overrides of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
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
_FREE_SECTIONS = ("model", "provider", "sources")
"""Sections that are dicts, whose keys :class:`TrainingConfig` does not define."""


def load_recipe(name: str) -> TrainingConfig:
    """Return the config of a recipe.

    Args:
        name: a name such as ``olmo2_1b``, or a file; ``:FUNCTION`` may follow either.

    Raises:
        InputError: there is no such recipe or function, it fails, or it returns another type.
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
            "those that have a name; give your own as its file, FILE.py"
        )
    read_small(path, RECIPE_LIMIT)
    return path


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: a recipe is a Python file, FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # recipes import modules from their folder
    # Cached bytecode is matched by size and whole seconds, and so could be of an edit before.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: can't be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
        sys.dont_write_bytecode = before
    return module


def _is_recipe(value: Any, module: ModuleType) -> bool:
    name = getattr(value, "__name__", "_")
    return getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")


def apply_overrides(config: TrainingConfig, overrides: Sequence[str]) -> TrainingConfig:
    """Return the config with ``section.field=value`` applied in order; values are read as YAML.

    Raises:
        InputError: there is no such field, or the value has another type.
    """
    values = as_dict(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r}: an override reads section.field=value")
        values = _override(values, key.strip(), text)
        values["sources"][key.strip()] = OVERRIDDEN
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> TrainingConfig:
    """Return a config from its nested plain values: the inverse of :func:`as_dict`.

    Raises:
        InputError: a value has another type than its field.
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
    return _plain(OmegaConf.structured(config))


def _plain(container: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(container)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _override(values: dict[str, Any], key: str, text: str) -> dict[str, Any]:
    """Return the values with one overridden.

    The key must exist. In ``provider`` and ``sources``, and in a ``model`` without any, it may be
    new.
    """
    section, _, name = key.partition(".")
    known = config_fields()
    is_list = key in known and str(known[key].type).startswith("list")
    if section in _FREE_SECTIONS and name:
        present = [f"{section}.{field}" for field in values[section]]
        if section == "model" and present and key not in present:
            raise InputError(f"no field {key!r} in the model's config{nearest(key, present)}")
    elif key not in known:
        raise InputError(
            f"no field {key!r}{nearest(key, known)} (`--dry-run` shows all of a recipe's)"
        )
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        if is_list and value is not None and not OmegaConf.is_list(value):
            value = [value]  # data.path=PREFIX means data.path=[PREFIX]
        container = OmegaConf.create(values)
        OmegaConf.update(container, key, value, merge=False, force_add=True)
    except UnicodeEncodeError as error:
        raise InputError(f"{key}={text}: is not UTF-8") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise InputError(f"{key}={text}: {str(error).splitlines()[0]}") from error
    return _plain(container)


def config_fields() -> dict[str, Field[Any]]:
    """Return the fields of :class:`TrainingConfig`, by ``section.field``."""
    found: dict[str, Field[Any]] = {}
    for field in fields(TrainingConfig):
        is_optional = field.name == "classification"  # whose default is None
        section = ClassificationConfig if is_optional else field.default_factory
        if is_dataclass(section):
            found |= {f"{field.name}.{inner.name}": inner for inner in fields(section)}
        else:
            found[field.name] = field
    return found
