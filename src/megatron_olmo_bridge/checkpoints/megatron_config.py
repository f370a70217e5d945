"""Read the config of a Megatron checkpoint's model, and compare it with the recorded settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, UnsupportedError
from megatron_olmo_bridge.formats.hf_folder import CONFIG, read_config, refuse_outside
from megatron_olmo_bridge.formats.plain_yaml import read_yaml
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder
from megatron_olmo_bridge.mapping.registry import bulleted
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridges
from megatron_olmo_bridge.models.record_check import contradictions

HF_SUBFOLDER = "hf"
"""Subfolder of an iteration with the Hugging Face model's config and tokenizer files."""
RUN_CONFIG = "run_config.yaml"


def config_of(
    dist: TorchDistFolder, hf_config: str | Path | None, vocab_size: int | None
) -> tuple[dict[str, Any], AnyPath, AnyPath | None]:
    """Return the values of config.json, the file they are from, and the folder of the artifacts.

    They are read from the first of these that exists: the folder ``hf_config``, the subfolder that
    this package writes, Megatron-Bridge's run_config.yaml, Megatron-LM's args.

    Raises:
        InputError: there is none of these, or a value is missing or invalid.
        UnsupportedError: no family can be built from these settings.
    """
    folder = Path(hf_config) if hf_config else dist.path / HF_SUBFOLDER
    if hf_config or (folder / CONFIG).exists():
        if not hf_config:
            refuse_outside(folder, dist.path)
        config = read_config(folder)
        if vocab_size is not None:
            config["vocab_size"] = vocab_size
        return config, folder / CONFIG, folder
    run_config = dist.path / RUN_CONFIG
    if run_config.exists():
        record, record_file = model_section(run_config), run_config
        if record is None:
            raise FormatError(f"{run_config}: has no model section")
    elif dist.args:
        record, record_file = dist.args, dist.common_file
    else:
        raise InputError(
            f"{dist.path}: doesn't say what model it holds (no {HF_SUBFOLDER}/{CONFIG}, no "
            f"{RUN_CONFIG}, no args in its common state). Pass --hf-config with a folder that has "
            "the model's config.json."
        )
    errors: list[Exception] = []
    for bridge in bridges():
        try:
            return bridge.hf_config_of_record(record, vocab_size), record_file, None
        except (BridgeError, TypeError, ValueError) as error:
            errors.append(error)
    # UnsupportedError means that the record is of another family: report other errors first.
    errors.sort(key=lambda error: isinstance(error, UnsupportedError))
    error_class = UnsupportedError if isinstance(errors[0], UnsupportedError) else InputError
    raise error_class(f"{record_file}: {errors[0]}") from errors[0]


def check_agreement(
    dist: TorchDistFolder, bridge: ModelBridge, config_from: AnyPath, *, any_vocab_size: bool
) -> None:
    """Raise InputError if the settings recorded in the checkpoint contradict its config.

    Args:
        dist: the checkpoint.
        bridge: bridge of the config.
        config_from: file that the config was read from.
        any_vocab_size: ignore the recorded vocabulary size, since the user stated another.
    """
    for file, record in _records(dist):
        if any_vocab_size:
            record = {name: value for name, value in record.items() if name != "vocab_size"}
        lines = contradictions(bridge, record, dist.tensors) if file != config_from else []
        if lines:
            raise InputError(
                f"{config_from} contradicts {file}:\n{bulleted(lines)}\nIs the config another "
                "model's? Pass --hf-config with the folder of the model that was saved here."
            )


def _records(dist: TorchDistFolder) -> Iterator[tuple[AnyPath, dict[str, Any]]]:
    """Yield each record of the model's settings, with its file."""
    run_config = dist.path / RUN_CONFIG
    if run_config.exists() and (section := model_section(run_config)) is not None:
        yield run_config, section
    if dist.args:
        yield dist.common_file, dist.args


def model_section(file: AnyPath) -> dict[str, Any] | None:
    """Return the ``model`` section of Megatron-Bridge's run_config.yaml; None if it has none.

    Raises:
        FormatError: the file is not sound YAML.
    """
    value = read_yaml(file)
    model = value.get("model") if isinstance(value, dict) else None
    return model if isinstance(model, dict) else None
