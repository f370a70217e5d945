"""Check that two checkpoints are equal bit for bit, or that files are as recorded."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, OptimizerState, ReadOptions
from megatron_olmo_bridge.checkpoints.differences import (
    Difference,
    artifact_differences,
    config_differences,
    name_differences,
)
from megatron_olmo_bridge.checkpoints.open import find_kind, open_checkpoint, options_for_each
from megatron_olmo_bridge.errors import InputError, MappingError
from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath, files_below
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE, Piece, TensorView
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.storage.execute import sha256
from megatron_olmo_bridge.storage.fetch import connections
from megatron_olmo_bridge.storage.hub import locate
from megatron_olmo_bridge.storage.plan import WORKERS
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import PROVENANCE, read_provenance
from megatron_olmo_bridge.storage.transfer import Transfer

from .model_card import MODEL_CARD


@dataclass(frozen=True)
class Verification:
    """Result of a verification."""

    differences: list[Difference]
    compared: int
    """Number of tensors, or files, that were compared."""
    nbytes: int
    """Bytes compared."""
    notes: list[str] = field(default_factory=list)
    """What was not compared, and why."""
    checked: str = "tensors"
    """What was compared: ``tensors`` of two checkpoints; the files of one, by recorded
    ``checksums`` or only by ``sizes``, which damaged bytes don't change; or the weights of one, by
    their ``fingerprint`` or by the hashes of their ``blocks``."""

    @property
    def equal(self) -> bool:
        return not self.differences


def verify(
    first: str | AnyPath,
    second: str | AnyPath | None = None,
    options: ReadOptions | None = None,
    *,
    optimizer: bool = False,
    workers: int = WORKERS,
    reporter: Reporter | None = None,
) -> Verification:
    """Compare two checkpoints of any kind, bit for bit.

    Args:
        first: path, address or hub id.
        second: the same; None compares the files of ``first`` with the record that was
            written with them.
        options: facts that the checkpoints may not record. Options that only one kind has apply to
            checkpoints of that kind.
        optimizer: compare the optimizer state too: moments, float32 weights, steps and settings.
        workers: number of threads. Each holds a few MiB of a tensor.
        reporter: receives progress.

    Raises:
        BridgeError: a path is not a checkpoint, or is damaged; or neither has a use for an option.
    """
    reporter = reporter or Reporter()
    options = options or ReadOptions()
    path = locate(first, connections=options.max_connections)
    if second is None:
        return _verify_recorded(path, options, workers, reporter)
    checkpoints = []
    paths = path, locate(second, connections=options.max_connections)
    workers = max(workers, connections(paths))
    each_options = options_for_each(paths, options)
    for path, path_options in zip(paths, each_options, strict=True):
        try:
            checkpoints.append(open_checkpoint(path, path_options, strict=False))
        except MappingError as error:
            return Verification([Difference("mapping", str(path), str(error))], 0, 0)
    a, b = checkpoints
    differences = list(config_differences(a, b)) + list(name_differences(a.tensors, b.tensors))
    differences += [
        Difference("missing", name, "in neither, though the config asks for it")
        for name in a.mapping.hf_shapes
        if name not in a.tensors and name not in b.tensors
    ]
    of_artifacts, artifact_notes = artifact_differences(a, b)
    differences += of_artifacts
    pairs, padding_notes = _pairs(a, b)
    if optimizer:
        differences += _state_differences(a.optimizer_state, b.optimizer_state)
        pairs += _state_pairs(a.optimizer_state, b.optimizer_state)
    total = sum(view.nbytes for view, _ in pairs)
    reporter.begin("verifying", total)

    def compare(pair: tuple[TensorView, TensorView]) -> Difference | None:
        with Transfer() as left, Transfer() as right:
            return _compare(*pair, left, right, reporter)

    with ThreadPoolExecutor(workers) as pool:
        differences += [d for d in pool.map(compare, pairs) if d]
    reporter.end()
    for checkpoint in checkpoints:
        checkpoint.snapshot.check_unchanged()
    return Verification(differences, len(pairs), total, artifact_notes + padding_notes)


def _pairs(a: Checkpoint, b: Checkpoint) -> tuple[list[tuple[TensorView, TensorView]], list[str]]:
    """Return the pairs of tensors and padding rows to compare, and notes on rows without a pair."""
    pairs = [(view, b.tensors[name]) for name, view in a.tensors.items() if name in b.tensors]
    notes = []
    for this, other in ((a, b), (b, a)):
        for name, view in this.padding.items():
            counterpart = other.padding.get(name)
            if counterpart is not None and counterpart.shape == view.shape:
                pairs += [(view, counterpart)] if this is a else []
            elif (read_provenance(this.path) or {}).get("operation") == "import":
                zeros = Piece.zeros(Region.whole(view.shape))
                pairs.append((view, dataclasses.replace(view, pieces=(zeros,))))
            else:
                notes.append(f"{this.path}: {name} were not compared: trained, in no other model")
    same = [(x, y) for x, y in pairs if x.shape == y.shape and x.dtype == y.dtype]
    return same, notes


def _state_differences(a: OptimizerState, b: OptimizerState) -> list[Difference]:
    """Return what differs of two optimizer states besides their tensors."""
    values = [{"step": s.step, "iteration": s.iteration, **s.settings} for s in (a, b)]
    return [
        Difference("optimizer", name, f"{value} and {values[1].get(name)}")
        for name, value in values[0].items()
        if values[1].get(name) != value
    ]


def _state_pairs(a: OptimizerState, b: OptimizerState) -> list[tuple[TensorView, TensorView]]:
    """Return the pairs of tensors of the state to compare, named by what they are."""
    return [
        (dataclasses.replace(view, name=f"{kind} of {view.name}"), other)
        for kind, tensors in a.tensors.items()
        for view, other in _pairs(tensors, b.tensors[kind])[0]
    ]


def _compare(
    a: TensorView, b: TensorView, left: Transfer, right: Transfer, reporter: Reporter
) -> Difference | None:
    count, example = 0, ""
    for (top, _, block_a), (_, _, block_b) in zip(left.blocks(a), right.blocks(b), strict=True):
        reporter.advance(len(block_a))
        # A bytearray is compared as memory, a memoryview element by element.
        if bytearray(block_a) == block_b:
            continue
        import torch

        bits = torch.int32 if ITEM_SIZE[a.dtype] == 4 else torch.int16
        x, y = torch.frombuffer(block_a, dtype=bits), torch.frombuffer(block_b, dtype=bits)
        places = (x != y).nonzero()
        if not count:
            at = int(places[0])
            columns = Region.whole(a.shape).columns
            values = [v.view(getattr(torch, a.dtype))[at].item() for v in (x, y)]
            place = f"[{top + at // columns}, {at % columns}]"
            example = f"first at {place}: {values[0]} and {values[1]}"
        count += len(places)
    if not count:
        return None
    size = Region.whole(a.shape).size
    return Difference("values", a.name, f"{count} of {size} differ; {example}")


def _verify_recorded(
    path: AnyPath, options: ReadOptions | None, workers: int, reporter: Reporter
) -> Verification:
    if isinstance(path, RemotePath):
        raise InputError(
            f"{path}: recorded files are checked where they are. Name a second checkpoint to "
            "compare it with, or --fingerprint."
        )
    _, folder = find_kind(path)
    recorded = read_provenance(folder)
    if recorded is None:
        raise InputError(
            f"{folder}: has no {PROVENANCE}: nothing was recorded to check it against. "
            "Name a second checkpoint to compare it with."
        )
    differences = []
    files: dict[str, dict[str, Any]] = recorded.get("files", {})
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            differences.append(Difference("missing", name, "recorded, but not there"))
        elif file.stat().st_size != entry["bytes"]:
            detail = f"{file.stat().st_size} bytes, recorded were {entry['bytes']}"
            differences.append(Difference("file", name, detail))
    present = files_below(folder).keys()
    for name in sorted(present - files.keys() - {PROVENANCE, MODEL_CARD}):
        differences.append(Difference("unexpected", name, "there, but not recorded"))
    checkable = {n: e for n, e in files.items() if "sha256" in e and (folder / n).is_file()}
    total = sum((folder / n).stat().st_size for n in checkable)
    reporter.begin("verifying", total)
    with ThreadPoolExecutor(workers) as pool:
        digests = pool.map(sha256, [folder / n for n in checkable])
        for (name, entry), digest in zip(checkable.items(), digests, strict=True):
            reporter.advance(entry["bytes"])
            if digest != entry["sha256"]:
                differences.append(Difference("checksum", name, "SHA-256 is not the recorded one"))
    reporter.end()
    if not differences:
        open_checkpoint(folder, options)  # headers and mapping are sound
    if len(checkable) == len(files):
        return Verification(differences, len(files), total, checked="checksums")
    note = (
        "no checksums were recorded: only names and sizes were compared, which damaged bytes don't "
        "change. --checksum of import, export and average records them."
    )
    return Verification(differences, len(files), total, [note], checked="sizes")
