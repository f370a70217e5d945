"""Export: a Megatron ``torch_dist`` checkpoint, or one of OLM, becomes a Hugging Face one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_olmo_bridge.checkpoints.detect import Kind
from megatron_olmo_bridge.checkpoints.source import (
    Source,
    config_with_dtype,
    open_source,
    recorded_dtypes,
)
from megatron_olmo_bridge.errors import BridgeError, InputError, SkippedError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.hf_folder import CONFIG, INDEX, SINGLE, side_files
from megatron_olmo_bridge.formats.iterations import iteration_folders
from megatron_olmo_bridge.formats.safetensors import write_header
from megatron_olmo_bridge.formats.tensors import TensorView
from megatron_olmo_bridge.mapping.registry import bulleted
from megatron_olmo_bridge.storage.execute import execute
from megatron_olmo_bridge.storage.plan import WORKERS, CopyPlan, Literal, OutputFile, Payload
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import Provenance
from megatron_olmo_bridge.storage.stage import refuse_overlap

if TYPE_CHECKING:
    import torch

MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Exports:
    """What an export writes: one folder, or one for each iteration."""

    source: Path
    plans: list[tuple[CopyPlan, Provenance, Path]]
    """The plan, what is recorded of it, and the folder it goes to."""
    skipped: dict[str, BridgeError]
    """Iterations that can't be read, for example since their save was interrupted, and why."""

    def check_all_planned(self, where: str) -> None:
        """Raise SkippedError if some iterations can't be exported; the others are ``where``."""
        if self.skipped:
            reasons = [f"{name}: {error}" for name, error in self.skipped.items()]
            raise SkippedError(
                f"{self.source}: {len(self.skipped)} of {len(self.skipped) + len(self.plans)} "
                f"iterations can't be exported; the others are {where}. Skipped:\n"
                f"{bulleted(reasons, len(reasons))}"
            )


def export_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | torch.dtype = "keep",
    iteration: int | str | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    hf_config: str | Path | None = None,
    vocab_size: int | None = None,
    heads: int | None = None,
    workers: int = WORKERS,
    resume: bool = False,
    overwrite: bool = False,
    checksum: bool = False,
    reporter: Reporter | None = None,
) -> list[CopyPlan]:
    """Write a Megatron checkpoint as ``save_pretrained`` would write its model.

    Args:
        source: a checkpoint root or an iteration's folder, saved at any parallel layout; or OLM's
            ``step_N.pt``.
        destination: the folder to make; with ``iteration="all"`` one folder in it for each.
        dtype: ``keep``, ``float32``, ``bfloat16`` or ``float16``; also ``bf16`` or a torch dtype.
        iteration: a number, ``release`` or ``all``; None takes the tracker's.
        max_shard_size: bytes, or a text such as ``5GB``.
        hf_config: folder with config.json and tokenizer, where the checkpoint has none.
        vocab_size: rows to keep of a padded vocabulary, where the checkpoint doesn't record it.
        heads: attention heads of a checkpoint of OLM, which doesn't say.
        workers, resume, overwrite, checksum, reporter: as for ``import_checkpoint``.

    Returns:
        The plans that were carried out, one for each iteration.

    Raises:
        SkippedError: of all iterations some could not be read; the others are exported.
        BridgeError: the source is not sound or not supported, or the output can't be written.
    """
    exports = plan_exports(
        source, destination, dtype=dtype, iteration=iteration, max_shard_size=max_shard_size,
        hf_config=hf_config, vocab_size=vocab_size, heads=heads,
    )  # fmt: skip
    for plan, provenance, folder in exports.plans:
        execute(
            plan, folder, provenance, workers=workers, resume=resume, overwrite=overwrite,
            checksum=checksum, reporter=reporter,
        )  # fmt: skip
    exports.check_all_planned(f"in {destination}")
    return [plan for plan, _, _ in exports.plans]


def plan_exports(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | torch.dtype = "keep",
    iteration: int | str | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    hf_config: str | Path | None = None,
    vocab_size: int | None = None,
    heads: int | None = None,
) -> Exports:
    """Plan an export from headers alone; arguments as :func:`export_checkpoint`."""
    dtype = parse_dtype(dtype)
    limit = parse_size(max_shard_size)
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    refuse_overlap(source, destination)
    targets = [(iteration, destination)]
    if iteration == "all":
        folders = iteration_folders(source) if source.is_dir() else []
        if not folders:
            raise InputError(f"{source}: has no iter_ folders")
        names = [f.name.removeprefix("iter_") for f in folders]
        targets = [(n, destination / f.name) for n, f in zip(names, folders, strict=True)]
    exports = Exports(source, [], {})
    for which, folder in targets:
        try:
            opened = open_source(
                source, iteration=which, hf_config=hf_config, vocab_size=vocab_size, heads=heads
            )
        except BridgeError as error:
            if iteration != "all":
                raise
            exports.skipped[folder.name] = error
            continue
        if opened.kind is Kind.HF:
            raise InputError(
                f"{source}: is a Hugging Face checkpoint already; export reads Megatron"
            )
        plan = _plan(opened, dtype, limit)
        options = {"dtype": dtype, "max_shard_bytes": limit}
        provenance = Provenance(str(opened.folder.resolve()), None, options)
        exports.plans.append((plan, provenance, folder))
    if not exports.plans:
        raise next(iter(exports.skipped.values()))
    return exports


def parse_size(size: str | int) -> int:
    """Bytes of ``5GB``, ``200MiB`` or a plain number.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if not count:
        raise InputError(f"{size!r} is no size: write 5GB, 500MB or a number of bytes")
    return count


def _plan(source: Source, dtype: str, limit: int) -> CopyPlan:
    files = shards(source.tensors, dtype, limit)
    stored = dtype if dtype != "keep" else source.tensors[next(iter(source.tensors))].dtype
    texts = index_of(files) | side_texts(source.hf_config, stored, source.side_folder)
    return CopyPlan("export", source.folder, files, texts, ".", snapshots=(source.snapshot,))


def side_texts(config: dict[str, Any], dtype: str, folder: Path | None) -> dict[str, bytes]:
    """The small files beside weights of a dtype, by name: config.json, and what the folder has.

    The folder's config.json is taken byte for byte if it says the same.
    """
    texts = {} if folder is None else side_files(folder)
    recorded = recorded_dtypes(config)
    right = recorded and all(value == dtype for value in recorded.values())
    if CONFIG not in texts or not right or json.loads(texts[CONFIG]) != config:
        texts[CONFIG] = config_with_dtype(config, dtype)
    return texts


def shards(tensors: dict[str, TensorView], dtype: str, limit: int) -> tuple[OutputFile, ...]:
    """The safetensors files for these tensors, each with at most ``limit`` bytes of them.

    Named as ``save_pretrained`` names them.
    """
    groups: list[list[Payload]] = [[]]
    filled = 0
    for view in tensors.values():
        payload = Payload(0, view, view.dtype if dtype == "keep" else dtype)
        if groups[-1] and filled + payload.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(payload)
        filled += payload.nbytes
    files = []
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
        header = write_header({p.view.name: (p.dtype, p.view.shape) for p in group})
        parts: list[Literal | Payload] = [Literal(0, header)]
        offset = len(header)
        for p in group:
            parts.append(Payload(offset, p.view, p.dtype))
            offset += p.nbytes
        files.append(OutputFile(name, offset, tuple(parts)))
    return tuple(files)


def index_of(files: tuple[OutputFile, ...]) -> dict[str, bytes]:
    """The index of several shards, by name; nothing for a single one."""
    if len(files) == 1:
        return {}
    weight_map = {p.view.name: f.name for f in files for p in f.payloads}
    metadata = {"total_size": sum(p.nbytes for f in files for p in f.payloads)}
    value = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: json.dumps(value, indent=2).encode() + b"\n"}
