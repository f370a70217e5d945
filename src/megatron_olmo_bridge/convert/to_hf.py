"""Export a checkpoint to a Hugging Face folder, or to one of OLMo-core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.hf import HFCheckpoint
from megatron_olmo_bridge.checkpoints.hf_files import index_of, output_artifacts, parse_size, shards
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import BridgeError, InputError, SkippedError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.iterations import iteration_folders
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.mapping.registry import bulleted
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.hub import locate
from megatron_olmo_bridge.storage.plan import CopyPlan
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import Provenance
from megatron_olmo_bridge.storage.stage import refuse_overlap

from .options import ExportOptions
from .output import write_output
from .to_olmo_core import plan_olmo_core


@dataclass(frozen=True)
class Exports:
    """Plans of an export: one, or one for each iteration."""

    source: AnyPath
    plans: list[tuple[CopyPlan, Provenance, Path]]
    """Each plan, its provenance record, and the folder to write."""
    skipped: dict[str, BridgeError]
    """Errors of iterations that can't be read, for example because their save was interrupted."""

    def check_all_planned(self, where: str) -> None:
        """Raise SkippedError if some iterations can't be exported.

        Args:
            where: where the others are, for the message.
        """
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
    options: ExportOptions | None = None,
    write: WriteOptions | None = None,
    reporter: Reporter | None = None,
) -> list[CopyPlan]:
    """Write a Megatron checkpoint as ``save_pretrained`` would write its model.

    Args:
        source: a checkpoint root or an iteration's folder, saved at any parallel layout; or OLM's
            ``step_N.pt``; or the address of one.
        destination: folder to create; for ``iteration="all"`` it gets a folder per iteration.
        options: defaults if None.
        write: how to write the output; defaults if None.
        reporter: receives progress.

    Returns:
        The plans that were executed, one for each iteration.

    Raises:
        SkippedError: some of all iterations could not be read; the others are exported.
        BridgeError: the source is damaged or not supported, or the output can't be written.
    """
    exports = plan_exports(source, destination, options)
    for plan, provenance, folder in exports.plans:
        write_output(plan, folder, provenance, write, reporter)
    exports.check_all_planned(f"in {destination}")
    return [plan for plan, _, _ in exports.plans]


def plan_exports(
    source: str | AnyPath, destination: str | Path, options: ExportOptions | None = None
) -> Exports:
    """Plan an export from headers alone; arguments as for :func:`export_checkpoint`."""
    options = options or ExportOptions()
    dtype, limit = parse_dtype(options.dtype), parse_size(options.max_shard_size)
    if options.to not in ("hf", "olmo-core"):
        raise InputError(f"--to {options.to}: is neither hf nor olmo-core")
    if options.optimizer and options.to == "hf":
        raise InputError("--optimizer needs --to olmo-core: Hugging Face has no optimizer state")
    source = locate(source, connections=options.max_connections)
    destination = Path(destination).expanduser()
    refuse_overlap(source, destination)
    all_iterations = options.iteration == "all"
    targets = {destination: options.iteration}
    if all_iterations:
        folders = iteration_folders(source) if source.is_dir() else []
        if not folders:
            raise InputError(f"{source}: has no iter_ folders")
        targets = {destination / f.name: f.name.removeprefix("iter_") for f in folders}
    exports = Exports(source, [], {})
    for folder, iteration in targets.items():
        try:
            checkpoint = open_checkpoint(source, replace(options, iteration=iteration))
        except BridgeError as error:
            if not all_iterations:
                raise
            exports.skipped[folder.name] = error
            continue
        if options.to == "olmo-core":
            state = checkpoint.optimizer_state if options.optimizer else None
            plan = plan_olmo_core(checkpoint, dtype, state)
            record = {"dtype": dtype, "to": options.to, "optimizer": options.optimizer}
            provenance = Provenance(str(checkpoint.path.resolve()), None, record)
            exports.plans.append((plan, provenance, folder))
            continue
        if isinstance(checkpoint, HFCheckpoint):
            raise InputError(
                f"{source}: is a Hugging Face checkpoint already; --to olmo-core makes it one of "
                "OLMo-core"
            )
        plan = _plan(checkpoint, dtype, limit)
        record = {"dtype": dtype, "max_shard_bytes": limit}
        provenance = Provenance(str(checkpoint.path.resolve()), None, record)
        exports.plans.append((plan, provenance, folder))
    if not exports.plans:
        raise next(iter(exports.skipped.values()))
    return exports


def _plan(source: Checkpoint, dtype: str, limit: int) -> CopyPlan:
    files = shards(source.tensors, dtype, limit)
    stored = dtype if dtype != "keep" else source.tensors[next(iter(source.tensors))].dtype
    texts = index_of(files) | output_artifacts(source.hf_config, stored, source.artifacts_folder)
    return CopyPlan("export", source.path, files, texts, ".", snapshots=(source.snapshot,))
