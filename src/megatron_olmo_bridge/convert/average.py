"""Average checkpoints of one model, as OLMo-2's stage 2 does: streamed, and no model is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_olmo_bridge.checkpoints.differences import config_differences, name_differences
from megatron_olmo_bridge.checkpoints.source import Source, open_source
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.tensors import MeanView, TensorView
from megatron_olmo_bridge.mapping.registry import bulleted
from megatron_olmo_bridge.storage.execute import execute
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.storage.plan import WORKERS, CopyPlan
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import Provenance
from megatron_olmo_bridge.storage.stage import refuse_overlap

from .to_hf import MAX_SHARD_SIZE, index_of, parse_size, shards, side_texts

if TYPE_CHECKING:
    import torch


def average_checkpoints(
    sources: Sequence[str | Path],
    destination: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "keep",
    max_shard_size: str | int = MAX_SHARD_SIZE,
    workers: int = WORKERS,
    resume: bool = False,
    overwrite: bool = False,
    checksum: bool = False,
    reporter: Reporter | None = None,
) -> CopyPlan:
    """Write the mean of the weights of several checkpoints as a Hugging Face checkpoint.

    Each value is added up in float64 and rounded to float32, and from there to the output's dtype:
    the mean of copies is the copy, bit for bit. A few MiB of a tensor are in memory at a time.

    Args:
        sources: two or more of the same model, each a Hugging Face folder, a hub id, a Megatron
            checkpoint root or an iteration's folder. Config and tokenizer are the first one's.
        destination: the folder to make.
        weights: a share for each source, above 0; they are divided by their sum. By default all
            count the same.
        dtype: ``keep`` (all must have the same then), ``float32``, ``bfloat16`` or ``float16``;
            also ``bf16`` or a torch dtype.
        max_shard_size: bytes, or a text such as ``5GB``.
        workers, resume, overwrite, checksum, reporter: as for ``import_checkpoint``.

    Returns:
        The plan that was carried out.

    Raises:
        InputError: the sources are not of the same model, or the weights are none.
        BridgeError: a source is not sound or not supported, or the output can't be written.
    """
    plan, provenance = plan_average(
        sources, destination, weights=weights, dtype=dtype, max_shard_size=max_shard_size
    )
    execute(
        plan, Path(destination).expanduser(), provenance, workers=workers, resume=resume,
        overwrite=overwrite, checksum=checksum, reporter=reporter,
    )  # fmt: skip
    return plan


def plan_average(
    sources: Sequence[str | Path],
    destination: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "keep",
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> tuple[CopyPlan, Provenance]:
    """The plan, from headers alone; arguments as :func:`average_checkpoints`."""
    dtype = parse_dtype(dtype)
    limit = parse_size(max_shard_size)
    shares = _shares(weights, len(sources))
    fetched = [fetch(str(source), None) for source in sources]
    opened = [open_source(folder) for folder, _, _ in fetched]
    for source in opened:
        refuse_overlap(source.folder, Path(destination).expanduser())
    first = opened[0]
    for source in opened[1:]:
        _check_same_model(first, source, any_dtype=dtype != "keep")
    tensors: dict[str, TensorView] = {
        name: MeanView.of(
            zip(shares, (source.tensors[name] for source in opened), strict=True),
            view.dtype if dtype == "keep" else dtype,
        )
        for name, view in first.tensors.items()
    }
    files = shards(tensors, "keep", limit)
    stored = next(iter(tensors.values())).dtype
    texts = index_of(files) | side_texts(first.hf_config, stored, first.side_folder)
    snapshots = tuple(source.snapshot for source in opened)
    plan = CopyPlan("average", first.folder, files, texts, ".", snapshots=snapshots)
    names = [f"{name} at {commit}" if commit else name for _, name, commit in fetched]
    options = {"dtype": dtype, "max_shard_bytes": limit, "weights": shares}
    return plan, Provenance(", ".join(names), None, options)


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


def _check_same_model(first: Source, other: Source, any_dtype: bool) -> None:
    found = [*config_differences(first, other), *name_differences(first.tensors, other.tensors)]
    wrong = [d for d in found if not (any_dtype and d.kind == "dtype")]
    if wrong:
        lines = bulleted([f"{d.kind}, {d.name}: {d.detail}" for d in wrong])
        if all(d.kind == "dtype" for d in wrong):
            lines += "\nPass --dtype float32, for example, to average them all the same."
        raise InputError(
            f"{first.folder} and {other.folder} can't be averaged. What differs:\n{lines}"
        )
