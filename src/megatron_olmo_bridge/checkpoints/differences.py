"""Differences of two checkpoints besides values: configs, artifacts, tensor names and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.errors import FormatError, quote
from megatron_olmo_bridge.formats.files import parse_json
from megatron_olmo_bridge.formats.hf_folder import CONFIG, artifact_files
from megatron_olmo_bridge.formats.tensors import TensorSpec
from megatron_olmo_bridge.models.heads import architectures_of_config

_NO_MEANING = {"transformers_version", "_name_or_path", "name_or_path"}
"""Keys of JSON files that do not describe the model."""
_ROPES = {"rope_theta", "rope_scaling", "rope_parameters"}
_DTYPES = {"torch_dtype", "dtype"}
_CLASSES = {"architectures", "model_type"}
"""Keys of config.json with several spellings, whose meaning is compared otherwise."""
_GENERATION_CONFIG = "generation_config.json"
_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One difference of two checkpoints, or of a checkpoint and its record."""

    kind: str
    """missing, unexpected, shape, dtype, values, config, mapping, file, checksum or fingerprint."""
    name: str
    detail: str


def config_differences(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Yield the differences of the config values, and of config.json if both were read from one."""
    if a.bridge.family != b.bridge.family:
        yield Difference("config", "family", f"{a.bridge.family} and {b.bridge.family}")
        return
    yield from _value_differences("config", "", a.bridge.config_values, b.bridge.config_values)
    if a.artifacts_folder and b.artifacts_folder:
        tasks = _task(a), _task(b)
        if tasks[0] != tasks[1]:
            yield Difference("config", "architectures", " and ".join(tasks))
        skipped = _ROPES | _DTYPES | _CLASSES | a.bridge.hf_keys | a.bridge.config_values.keys()
        configs = [{k: v for k, v in s.hf_config.items() if k not in skipped} for s in (a, b)]
        yield from _value_differences("config", "", *configs)


def _task(source: Checkpoint) -> str:
    """Return the task of a config's first architecture, or the architecture if it is unknown."""
    if source.bridge.num_labels is not None:
        return "a classifier"
    names = architectures_of_config(source.hf_config)
    is_known = not names or names[0].endswith(source.bridge.architectures)
    return "a language model" if is_known else names[0]


def artifact_differences(a: Checkpoint, b: Checkpoint) -> tuple[list[Difference], list[str]]:
    """Compare all artifacts but config.json: JSON files by their values, others byte by byte.

    Returns:
        The differences, and notes on what was not compared since only one checkpoint has it.
    """
    files = [_artifact_files(a), _artifact_files(b)]
    names = sorted(files[0].keys() | files[1].keys())
    groups = (
        (_GENERATION_CONFIG, [n for n in names if n == _GENERATION_CONFIG]),
        ("tokenizer files", [n for n in names if n != _GENERATION_CONFIG]),
    )
    differences, notes = [], []
    for what, group in groups:
        lacking = [s.path for s, f in zip((a, b), files, strict=True) if not f.keys() & {*group}]
        if group and lacking:
            notes.append(f"{lacking[0]}: has no {what}, so the other's were not compared")
            continue
        for name in group:
            differences += _file_differences(name, files[0].get(name), files[1].get(name))
    return differences, notes


def _artifact_files(source: Checkpoint) -> dict[str, bytes]:
    files = artifact_files(source.artifacts_folder) if source.artifacts_folder else {}
    return {name: data for name, data in files.items() if name != CONFIG}


def _file_differences(name: str, first: bytes | None, second: bytes | None) -> list[Difference]:
    if first == second:
        return []
    if first is None or second is None:
        side = "second" if first is None else "first"
        return [Difference("file", name, f"only in the {side}")]
    try:
        is_json = name.endswith(".json")
        values = [parse_json(data, name) for data in (first, second)] if is_json else []
    except FormatError:  # compare the bytes
        values = []
    if [type(value) for value in values] == [dict, dict]:
        return list(_value_differences("file", f"{name}: ", *values))
    if values and _same(*values):
        return []
    return [Difference("file", name, f"other bytes: {len(first):,} and {len(second):,}")]


def name_differences(
    a: Mapping[str, TensorSpec], b: Mapping[str, TensorSpec]
) -> Iterator[Difference]:
    """Yield the differences of names, shapes and dtypes."""
    for name in a:
        if name not in b:
            yield Difference("missing", name, "only in the first")
    for name in b:
        if name not in a:
            yield Difference("unexpected", name, "only in the second")
    for name in [n for n in a if n in b]:
        if a[name].shape != b[name].shape:
            yield Difference("shape", name, f"{list(a[name].shape)} and {list(b[name].shape)}")
        elif a[name].dtype != b[name].dtype:
            yield Difference("dtype", name, f"{a[name].dtype} and {b[name].dtype}")


def _value_differences(
    kind: str, prefix: str, a: dict[str, Any], b: dict[str, Any]
) -> Iterator[Difference]:
    for key in sorted((a.keys() | b.keys()) - _NO_MEANING):
        values = a.get(key, _ABSENT), b.get(key, _ABSENT)
        if not _same(*values):
            detail = " and ".join(map(_shown, values))
            yield Difference(kind, f"{prefix}{key}", detail)


def _same(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal; NaN equals itself, and true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b or (a != a and b != b))


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else quote(value)
