"""Which model a Megatron checkpoint holds: its config.json, and whether its records agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, UnsupportedError
from megatron_olmo_bridge.formats.hf_folder import CONFIG, read_config, refuse_outside
from megatron_olmo_bridge.formats.plain_yaml import read_yaml
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder
from megatron_olmo_bridge.mapping.registry import bulleted
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridges
from megatron_olmo_bridge.models.record_check import contradictions

HF_SUBFOLDER = "hf"
"""In a Megatron checkpoint: config and tokenizer of the Hugging Face model it came from."""
RUN_CONFIG = "run_config.yaml"


def config_of(
    dist: TorchDistFolder, given: str | Path | None, vocab_size: int | None
) -> tuple[dict[str, Any], Path, Path | None]:
    """config.json of a Megatron checkpoint, the file it was taken from, and the tokenizer's folder.

    The first of: the folder the user names, the one this package wrote, Megatron-Bridge's
    run_config.yaml, Megatron-LM's args.
    """
    beside = dist.path / HF_SUBFOLDER
    if given or (beside / CONFIG).exists():
        folder = Path(given) if given else beside
        if not given:
            refuse_outside(beside, dist.path)
        config = read_config(folder)
        if vocab_size is not None:
            config["vocab_size"] = vocab_size
        return config, folder / CONFIG, folder
    run_config = dist.path / RUN_CONFIG
    if run_config.exists():
        section, where = model_section(run_config), run_config
        if section is None:
            raise FormatError(f"{run_config}: has no model section")
        values = section
    elif dist.args:
        values, where = dist.args, dist.common_file
    else:
        raise InputError(
            f"{dist.path}: doesn't say what model it holds (no {HF_SUBFOLDER}/{CONFIG}, no "
            f"{RUN_CONFIG}, no args in its common state). Pass --hf-config with a folder that has "
            "the model's config.json."
        )
    errors: list[Exception] = []
    for bridge in bridges():
        try:
            return bridge.record_class.hf_config(values, vocab_size), where, None
        except (BridgeError, TypeError, ValueError) as error:
            errors.append(error)
    # "Not supported" comes from a family that the values don't fit: report another error first.
    errors.sort(key=lambda error: isinstance(error, UnsupportedError))
    kind = UnsupportedError if isinstance(errors[0], UnsupportedError) else InputError
    raise kind(f"{where}: {errors[0]}") from errors[0]


def check_agreement(
    dist: TorchDistFolder, bridge: ModelBridge, config_from: Path, *, any_vocab_size: bool
) -> None:
    """Raise InputError if the checkpoint itself records another model than its config describes.

    Args:
        dist: the checkpoint.
        bridge: of the config.
        config_from: the file that the config was taken from.
        any_vocab_size: whether the vocabulary's size was asked for, whatever is recorded.
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


def _records(dist: TorchDistFolder) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What the checkpoint says of its model, beside a config.json, and the file that says it."""
    run_config = dist.path / RUN_CONFIG
    if run_config.exists() and (section := model_section(run_config)) is not None:
        yield run_config, section
    if dist.args:
        yield dist.common_file, dist.args


def model_section(file: Path) -> dict[str, Any] | None:
    """Return the ``model`` section of Megatron-Bridge's run_config.yaml; None if it has none.

    Raises:
        FormatError: not sound YAML.
    """
    value = read_yaml(file)
    model = value.get("model") if isinstance(value, dict) else None
    return model if isinstance(model, dict) else None
