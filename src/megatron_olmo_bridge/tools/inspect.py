"""What a checkpoint is, from its headers: nothing is loaded, nothing is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, ReadOptions
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
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
    options: ReadOptions | None = None,
    *,
    revision: str | None = None,
) -> Inspection:
    """Describe a checkpoint of any kind; its tensors are checked against its mapping.

    ``path`` may be a hub id, and ``revision`` a branch, tag or commit of it.

    Raises:
        BridgeError: it is no checkpoint, is damaged, or is not supported.
    """
    source = open_checkpoint(local_path(path, revision), options)
    folder = source.folder
    root, paths = (folder.parent, [folder]) if folder.is_file() else (folder, folder.rglob("*"))
    files = {f.relative_to(root).as_posix(): f.stat().st_size for f in sorted(paths) if f.is_file()}
    views = source.megatron or source.tensors
    return Inspection(
        kind=source.kind,
        folder=str(source.folder),
        family=source.bridge.family,
        size=source.bridge.size_name(),
        parameters=source.parameters,
        dtypes=source.dtypes,
        nbytes=sum(files.values()),
        files=files,
        layout=source.layout,
        iterations=source.iterations,
        vocab_size=source.bridge.vocab_size,
        padded_vocab_size=source.padded_vocab_size,
        numbers=source.bridge.config_values,
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


def _megatron_flags(source: Checkpoint) -> list[str]:
    dtype = source.tensors[next(iter(source.tensors))].dtype
    flags = source.bridge.megatron_record.flags(source.padded_vocab_size, dtype)
    return [*flags, *source.load_flags] if flags else []


def mapping_rows(source: Checkpoint) -> list[dict[str, str]]:
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
