"""What a checkpoint is, from its headers: nothing is loaded, nothing is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.checkpoints.detect import Kind
from megatron_olmo_bridge.checkpoints.source import Source, open_source
from megatron_olmo_bridge.errors import BridgeError
from megatron_olmo_bridge.formats.iterations import (
    iteration_folder,
    iteration_folders,
    iteration_number,
)
from megatron_olmo_bridge.formats.torch_dist import (
    TorchDistFolder,
)
from megatron_olmo_bridge.mapping.mappings import WILDCARD
from megatron_olmo_bridge.storage.hub import local_path
from megatron_olmo_bridge.storage.provenance import read_provenance


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    kind: str
    folder: str
    family: str
    size: str | None
    """The published size, ``olmo2-7b`` for example; None if it is of no published shape."""
    parameters: int
    dtypes: list[str]
    nbytes: int
    """Bytes of the files."""
    files: dict[str, int]
    layout: str
    iterations: list[str]
    vocab_size: int
    padded_vocab_size: int
    numbers: dict[str, Any]
    config_from: str
    provenance: dict[str, Any] | None
    tensors: list[dict[str, Any]]
    mapping: list[dict[str, str]]
    megatron_flags: list[str]
    """With ``--load``, of a Megatron checkpoint. Empty where Megatron-LM's command line can't say
    what the model is."""
    notes: list[str]
    """What somebody who converts it should know."""


def inspect(
    path: str | Path,
    *,
    revision: str | None = None,
    iteration: int | str | None = None,
    hf_config: str | Path | None = None,
    vocab_size: int | None = None,
    heads: int | None = None,
) -> Inspection:
    """Describe a checkpoint of any kind; its tensors are checked against its mapping.

    ``path`` may be a hub id, and ``revision`` a branch, tag or commit of it.

    Raises:
        BridgeError: it is no checkpoint, is damaged, or is not supported.
    """
    source = open_source(
        local_path(path, revision),
        iteration=iteration,
        hf_config=hf_config,
        vocab_size=vocab_size,
        heads=heads,
    )
    is_file = source.kind is Kind.OLM
    root = source.folder.parent
    files = {
        f.relative_to(root if is_file else source.folder).as_posix(): f.stat().st_size
        for f in ([source.folder] if is_file else sorted(source.folder.rglob("*")))
        if f.is_file()
    }
    views = source.megatron or source.tensors
    iterations = [f.name for f in iteration_folders(root)] if source.kind is Kind.MEGATRON else []
    return Inspection(
        kind=source.kind.value,
        folder=str(source.folder),
        family=source.bridge.family,
        size=source.bridge.size_name(),
        parameters=source.parameters,
        dtypes=source.dtypes,
        nbytes=sum(files.values()),
        files=files,
        layout=_layout(source),
        iterations=iterations,
        vocab_size=source.bridge.vocab_size,
        padded_vocab_size=source.padded_vocab_size,
        numbers=source.bridge.numbers,
        config_from=str(source.config_from),
        provenance=read_provenance(source.folder),
        tensors=[
            {"name": n, "shape": list(v.shape), "dtype": v.dtype, "pieces": len(v.pieces)}
            for n, v in views.items()
        ],
        mapping=mapping_rows(source),
        megatron_flags=_megatron_flags(source),
        notes=source.notes,
    )


def _megatron_flags(source: Source) -> list[str]:
    dtype = source.tensors[next(iter(source.tensors))].dtype
    flags = source.bridge.megatron_record.flags(source.padded_vocab_size, dtype)
    if not flags or source.kind is not Kind.MEGATRON:
        return flags
    folder = source.folder.resolve()
    flags += ["--load", str(folder.parent)]
    number = iteration_number(folder)
    return flags if number is None or _is_latest(folder) else [*flags, "--ckpt-step", str(number)]


def _is_latest(folder: Path) -> bool:
    """Whether Megatron-LM would take this iteration if none is asked for."""
    try:
        return iteration_folder(folder.parent, None) == folder
    except BridgeError:
        return False


def mapping_rows(source: Source) -> list[dict[str, str]]:
    """A row for each placement, layers written as ``*``: which block stands where."""
    rows = []
    for parameter in source.mapping.parameters.values():
        if any(parameter.index):  # all are alike; layer 0 and expert 0 speak for them
            continue
        for p in parameter.placements:
            name = p.hf_name or "zeros"
            name = re.sub(r"\.0(?=\.)", f".{WILDCARD}", name, count=len(parameter.index))
            hf_block = _block(p.hf_region, parameter.shape)
            rows.append(
                {
                    "megatron": parameter.pattern,
                    "block": _block(p.megatron_region, parameter.shape),
                    "hf": name,
                    "hf_block": f"{hf_block} transposed" if p.transposed else hf_block,
                }
            )
    return rows + [
        {"megatron": "", "block": f"ignored: {reason}", "hf": pattern, "hf_block": ""}
        for pattern, reason in source.mapping.ignored.items()
    ]


def _block(region: tuple[int, int, int, int], shape: tuple[int, ...]) -> str:
    rows = f"{region[0]}:{region[1]}"
    return f"[{rows}]" if len(shape) == 1 else f"[{rows}, {region[2]}:{region[3]}]"


def _layout(source: Source) -> str:
    if source.hf_folder is not None:
        return f"{len(source.hf_folder.shards)} safetensors file(s)"
    if source.kind is Kind.OLM:
        return "a file of its trainer"
    dist = TorchDistFolder.read(source.folder)
    layered = [p for p in source.mapping.parameters.values() if p.index]
    stacked = any(p.key(len(p.index)) in dist.tensors for p in layered)
    cuts = max(len(view.pieces) for view in source.megatron.values())
    keys = "layers stacked in one key" if stacked else "a key for each layer"
    others = len(dist.tensors) - len(dist.weights)
    state = f", {others} tensors of optimizer state" if others else ""
    return f"{keys}, tensors in up to {cuts} chunk(s){state}"
