"""The files of a Hugging Face checkpoint, as ``save_pretrained`` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.hf_folder import CONFIG, INDEX, SINGLE, artifact_files
from megatron_olmo_bridge.formats.safetensors import write_header
from megatron_olmo_bridge.formats.tensors import TensorSpec
from megatron_olmo_bridge.storage.plan import Literal, OutputFile, Payload

MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: str | int) -> int:
    """Return the number of bytes that ``5GB``, ``200MiB`` or a plain number stands for.

    Raises:
        InputError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if not count:
        raise InputError(f"{size!r} is not a size: write 5GB, 500MB or a number of bytes")
    return count


def output_artifacts(config: dict[str, Any], dtype: str, folder: Path | None) -> dict[str, bytes]:
    """Return the config and tokenizer files to write with the weights, by name.

    The folder's config.json is copied byte for byte if it has the same values and dtype.

    Args:
        config: values of config.json.
        dtype: dtype of the weights.
        folder: folder to copy the other files from; None for config.json alone.
    """
    files = {} if folder is None else artifact_files(folder)
    dtypes = recorded_dtypes(config).values()
    names_dtype = dtypes and all(recorded == dtype for recorded in dtypes)
    if CONFIG not in files or not names_dtype or json.loads(files[CONFIG]) != config:
        files[CONFIG] = config_with_dtype(config, dtype)
    return files


def shards(tensors: Mapping[str, TensorSpec], dtype: str, limit: int) -> tuple[OutputFile, ...]:
    """Return the safetensors files for these tensors, named as by ``save_pretrained``.

    Args:
        tensors: tensors in the order of the files.
        dtype: dtype of the files, or ``keep``.
        limit: maximum bytes of tensors in a file; a larger tensor gets a file of its own.
    """
    groups: list[list[Payload]] = [[]]
    end = 0
    for view in tensors.values():
        payload = Payload(end, view, view.dtype if dtype == "keep" else dtype)
        if groups[-1] and end + payload.nbytes > limit:
            groups.append([])
            payload = replace(payload, offset=0)
        groups[-1].append(payload)
        end = payload.offset + payload.nbytes
    files = []
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
        header = write_header({p.view.name: (p.dtype, p.view.shape) for p in group})
        payloads = [replace(p, offset=len(header) + p.offset) for p in group]
        size = payloads[-1].offset + payloads[-1].nbytes
        files.append(OutputFile(name, size, (Literal(0, header), *payloads)))
    return tuple(files)


def index_of(files: tuple[OutputFile, ...]) -> dict[str, bytes]:
    """Return the index of several shards, by file name; {} for a single shard."""
    if len(files) == 1:
        return {}
    weight_map = {p.view.name: f.name for f in files for p in f.payloads}
    metadata = {"total_size": sum(p.nbytes for f in files for p in f.payloads)}
    value = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: json.dumps(value, indent=2).encode() + b"\n"}


def recorded_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the weights' dtype in config.json, by the keys of transformers 5 and 4."""
    return {key: config[key] for key in ("dtype", "torch_dtype") if key in config}


def config_with_dtype(config: dict[str, Any], dtype: str) -> bytes:
    """Return the bytes of config.json with this dtype under each key that the config has for it."""
    keys = recorded_dtypes(config) or ("torch_dtype",)
    return json.dumps({**config, **dict.fromkeys(keys, dtype)}, indent=2).encode() + b"\n"
