"""The files of a Hugging Face checkpoint, as ``save_pretrained`` writes them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.hf_folder import CONFIG, INDEX, SINGLE, artifact_files
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.safetensors import write_header
from megatron_olmo_bridge.formats.tensors import TensorSpec
from megatron_olmo_bridge.storage.plan import Literal, OutputFile, Payload
from megatron_olmo_bridge.storage.runs import BLOCK, shared_residue

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


def output_artifacts(
    config: dict[str, Any], dtype: str, folder: AnyPath | None
) -> dict[str, bytes]:
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
    previous = None
    for origin, view in _by_origin(tensors, dtype, limit):
        payload = Payload(end, view, view.dtype if dtype == "keep" else dtype)
        if groups[-1] and (end + payload.nbytes > limit or origin != previous):
            groups.append([])
            payload = replace(payload, offset=0)
        groups[-1].append(payload)
        end = payload.offset + payload.nbytes
        previous = origin
    files = []
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
        files.append(_shard(name, group))
    return tuple(files)


def _by_origin(
    tensors: Mapping[str, TensorSpec], dtype: str, limit: int
) -> Iterator[tuple[int | None, TensorSpec]]:
    """Yield tensors in the order of the files, each with a number that all of its file have.

    In a file, tensors stand at one place within a block, or half a block further. So those that
    can be cloned from a file of the source with another place get files of their own, if they fill
    half of one. A short tensor stays with the one before it.
    """
    nbytes: Counter[int | None] = Counter()
    places: list[tuple[int | None, TensorSpec]] = []
    for view in tensors.values():
        residue = shared_residue(view, view.dtype if dtype == "keep" else dtype)
        place = None if residue is None else residue % (BLOCK // 2)
        nbytes[place] += view.nbytes
        places.append((place, view))
    origins = {
        place for place, count in nbytes.items() if place is not None and count >= limit // 2
    }
    origin = next((place for place, _ in places if place in origins), None)
    files: dict[int | None, list[TensorSpec]] = defaultdict(list)
    for place, view in places:
        if place in origins:
            origin = place
        files[origin].append(view)
    for origin, views in files.items():
        for view in views:
            yield origin, view


def _shard(name: str, group: list[Payload]) -> OutputFile:
    """Return a safetensors file of these tensors, in an order in which most can be cloned.

    Tensors follow each other without gaps. So the header is padded for the largest set of tensors
    that share a residue, and those come first.
    """
    residues: dict[str, int | None] = {}
    nbytes: Counter[int] = Counter()
    for payload in group:
        residue = residues[payload.view.name] = shared_residue(payload.view, payload.dtype)
        if residue is not None and residue % 8 == 0:  # as headers are
            nbytes[residue] += payload.nbytes
    begin = nbytes.most_common(1)[0][0] if nbytes else None
    ordered = group if begin is None else list(_following(group, residues, begin))
    header = write_header({p.view.name: (p.dtype, p.view.shape) for p in ordered}, begin, BLOCK)
    end, payloads = len(header), []
    for payload in ordered:
        payloads.append(replace(payload, offset=end))
        end += payload.nbytes
    return OutputFile(name, end, (Literal(0, header), *payloads))


def _following(
    group: list[Payload], residues: dict[str, int | None], begin: int
) -> Iterator[Payload]:
    """Yield payloads so that one whose residue is that of its place follows, as long as there is
    one; else one that isn't cloned, which may move the place; else the first."""
    waiting: dict[int | None, deque[Payload]] = defaultdict(deque)
    for payload in group:
        waiting[residues[payload.view.name]].append(payload)
    at = begin
    for _ in group:
        queue = waiting[at] or waiting[None] or next(filter(None, waiting.values()))
        payload = queue.popleft()
        yield payload
        at = (at + payload.nbytes) % BLOCK


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
