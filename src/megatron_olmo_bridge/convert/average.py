"""Average checkpoints of one model, as OLMo-2's stage 2 does: streamed, and no model is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.differences import config_differences, name_differences
from megatron_olmo_bridge.checkpoints.hf_files import index_of, output_artifacts, parse_size, shards
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.tensors import MeanView
from megatron_olmo_bridge.mapping.registry import bulleted
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.storage.plan import CopyPlan
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import Provenance
from megatron_olmo_bridge.storage.stage import refuse_overlap

from .options import AverageOptions
from .output import write_output


def average_checkpoints(
    sources: Sequence[str | Path],
    destination: str | Path,
    options: AverageOptions | None = None,
    write: WriteOptions | None = None,
    reporter: Reporter | None = None,
) -> CopyPlan:
    """Write the mean of the weights of several checkpoints as a Hugging Face checkpoint.

    Sums are computed in float64, and rounded to float32 and then to the output's dtype; so the mean
    of equal values is that value, bit for bit. Memory is a few MiB.

    Args:
        sources: two or more checkpoints of the same model, each a Hugging Face folder, a hub id, a
            Megatron checkpoint root or an iteration's folder. The first one's artifacts are copied.
        destination: folder to create.
        options: defaults if None.
        write: how to write the output; defaults if None.
        reporter: receives progress.

    Returns:
        The plan that was executed.

    Raises:
        InputError: the sources are not of the same model, or the weights are invalid.
        BridgeError: a source is damaged or not supported, or the output can't be written.
    """
    plan, provenance = plan_average(sources, destination, options)
    write_output(plan, destination, provenance, write, reporter)
    return plan


def plan_average(
    sources: Sequence[str | Path],
    destination: str | Path,
    options: AverageOptions | None = None,
) -> tuple[CopyPlan, Provenance]:
    """Return the plan, from headers alone; arguments as for :func:`average_checkpoints`."""
    options = options or AverageOptions()
    dtype, limit = parse_dtype(options.dtype), parse_size(options.max_shard_size)
    shares = _shares(options.weights, len(sources))
    fetched = [fetch(str(source), None, options.max_connections) for source in sources]
    opened = [open_checkpoint(folder) for folder, _, _ in fetched]
    for source in opened:
        refuse_overlap(source.path, Path(destination).expanduser())
    first = opened[0]
    for source in opened[1:]:
        _check_same_model(first, source, any_dtype=dtype != "keep")
    tensors = {
        name: MeanView.of(
            zip(shares, (source.tensors[name] for source in opened), strict=True),
            view.dtype if dtype == "keep" else dtype,
        )
        for name, view in first.tensors.items()
    }
    files = shards(tensors, "keep", limit)
    stored = next(iter(tensors.values())).dtype
    texts = index_of(files) | output_artifacts(first.hf_config, stored, first.artifacts_folder)
    snapshots = tuple(source.snapshot for source in opened)
    plan = CopyPlan("average", first.path, files, texts, ".", snapshots=snapshots)
    names = [f"{name} at {commit}" if commit else name for _, name, commit in fetched]
    record = {"dtype": dtype, "max_shard_bytes": limit, "weights": shares}
    return plan, Provenance(", ".join(names), None, record)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise InputError("an average needs two checkpoints or more, and then the folder to make")
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} checkpoints: give one for each")
    if bad := [w for w in weights if not (math.isfinite(w) and w > 0)]:
        raise InputError(f"a weight must be a number above 0, not {bad[0]}")
    return [float(w) for w in weights]


def _check_same_model(first: Checkpoint, other: Checkpoint, any_dtype: bool) -> None:
    all_differences = [
        *config_differences(first, other),
        *name_differences(first.tensors, other.tensors),
    ]
    differences = [d for d in all_differences if not (any_dtype and d.kind == "dtype")]
    if differences:
        lines = bulleted([f"{d.kind}, {d.name}: {d.detail}" for d in differences])
        if all(d.kind == "dtype" for d in differences):
            lines += "\nPass --dtype float32, for example, to average them all the same."
        raise InputError(f"{first.path} and {other.path} can't be averaged. What differs:\n{lines}")
