"""Describe a checkpoint from its headers: no tensor is loaded, no code is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, ReadOptions
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.formats.remote_path import AnyPath, files_below
from megatron_olmo_bridge.mapping.mappings import WILDCARD
from megatron_olmo_bridge.storage.hub import locate
from megatron_olmo_bridge.storage.provenance import read_provenance


@dataclass(frozen=True)
class Inspection:
    """Description of a checkpoint."""

    kind: str
    folder: str
    family: str
    size: str | None
    """Published size with these shapes, for example ``olmo2-7b``; None if there is none."""
    parameters: int
    dtypes: list[str]
    nbytes: int
    """Bytes of all files."""
    files: dict[str, int]
    """Bytes of each file."""
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
    """Flags for Megatron-LM, with ``--load`` for a Megatron checkpoint. Empty if Megatron-LM can't
    build the model."""
    notes: list[str]
    """Notes to show to the user who converts this checkpoint."""


def inspect(
    path: str | AnyPath,
    options: ReadOptions | None = None,
    *,
    revision: str | None = None,
) -> Inspection:
    """Describe a checkpoint of any kind, whose tensors are checked against its mapping.

    Args:
        path: path or address of the checkpoint, or a hub id.
        options: facts that the checkpoint may not record.
        revision: branch, tag or commit of a hub id.

    Raises:
        BridgeError: the path is not a checkpoint, or is damaged or not supported.
    """
    return describe(open_checkpoint(locate(path, revision), options))


def describe(source: Checkpoint) -> Inspection:
    """Describe a checkpoint that is open."""
    path = source.path
    found: dict[str, AnyPath] = {path.name: path} if path.is_file() else files_below(path)
    files = {name: file.stat().st_size for name, file in found.items()}
    views = source.megatron or source.tensors
    return Inspection(
        kind=source.kind,
        folder=str(source.path),
        family=source.bridge.family,
        size=source.bridge.size_name(),
        parameters=source.parameter_count,
        dtypes=source.dtypes,
        nbytes=sum(files.values()),
        files=files,
        layout=source.layout,
        iterations=source.iterations,
        vocab_size=source.bridge.vocab_size,
        padded_vocab_size=source.padded_vocab_size,
        numbers=source.bridge.config_values,
        config_from=str(source.config_from),
        provenance=read_provenance(source.path),
        tensors=[
            {"name": n, "shape": list(v.shape), "dtype": v.dtype, "pieces": len(v.pieces)}
            for n, v in views.items()
        ],
        mapping=mapping_rows(source),
        megatron_flags=_megatron_flags(source),
        notes=source.notes,
    )


def _megatron_flags(source: Checkpoint) -> list[str]:
    dtype = source.tensors[next(iter(source.tensors))].dtype
    flags = source.bridge.megatron_lm_flags(dtype)
    return [*flags, *source.load_flags] if flags else []


def mapping_rows(source: Checkpoint) -> list[dict[str, str]]:
    """Return a row for each placement, with ``*`` for the layer and the expert."""
    rows = []
    for parameter in source.mapping.parameters.values():
        if any(parameter.index):  # all are mapped like layer 0 and expert 0
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
