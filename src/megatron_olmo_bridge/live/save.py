"""Save a live model atomically, as a Hugging Face or a Megatron checkpoint."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from megatron_olmo_bridge.checkpoints.hf_files import (
    MAX_SHARD_SIZE,
    index_of,
    output_artifacts,
    parse_size,
    shards,
)
from megatron_olmo_bridge.checkpoints.megatron_config import HF_SUBFOLDER, RUN_CONFIG
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.formats.files import check_name
from megatron_olmo_bridge.formats.iterations import TRACKER
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.tensors import TensorSpec
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.runtime.process_groups import on_first, wait_for_all
from megatron_olmo_bridge.storage.atomic import PARTIAL, sync, sync_tree, write_synced
from megatron_olmo_bridge.storage.execute import cleaning_up, finish
from megatron_olmo_bridge.storage.lock import Lock, take
from megatron_olmo_bridge.storage.plan import CopyPlan, Literal
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import LIVE, Provenance
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER, Stage, clear, is_vacant
from megatron_olmo_bridge.storage.transfer import write_all

from .export import stream_weights
from .shards import LiveModel

ON_DISK = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""``content_metadata``: layers are stacked, as :mod:`convert.to_megatron` writes them."""


def save_hf(
    chunks: Sequence[torch.nn.Module],
    bridge: ModelBridge,
    destination: str | Path,
    *,
    artifacts_folder: AnyPath | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> None:
    """Write the weights as ``save_pretrained`` would. Collective; the first process writes.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        bridge: bridge of the model.
        destination: folder to create.
        artifacts_folder: folder with config.json and tokenizer files to copy.
        max_shard_size: bytes, or a text such as ``5GB``.
        overwrite: replace ``destination`` if it exists.
        reporter: receives the bytes written.

    Raises:
        OutputError: the output exists, or the disk is too small. Nothing is left behind.
    """
    reporter = reporter or Reporter()
    live = LiveModel.of(chunks, bridge)
    dtype = _dtype(live)
    specs = {n: TensorSpec(n, shape, dtype) for n, shape in live.mapping.hf_shapes.items()}
    files = shards(specs, "keep", parse_size(max_shard_size))
    texts = index_of(files) | output_artifacts(bridge.hf_config, dtype, artifacts_folder)
    plan = CopyPlan("export", artifacts_folder, files, texts, ".")
    target = Path(destination).expanduser()
    # An interrupted save may be of other weights, so its output is discarded.
    anew = overwrite or is_vacant(target)
    stage = on_first(lambda: _opened(Stage(target, plan, resume=False, overwrite=anew)))
    weights = stream_weights(chunks, bridge, names=specs, to=0, cpu=True)
    if stage is None:
        for _ in weights:
            raise AssertionError("only the first process receives the weights")
        return
    reporter.begin("saving", sum(payload.nbytes for payload in plan.payloads))
    with cleaning_up(stage):
        for file in files:
            fd = os.open(stage.folder / file.name, os.O_RDWR)
            try:
                for part in file.parts:
                    if isinstance(part, Literal):
                        write_all(fd, part.data, part.offset)
                        continue
                    name, tensor = next(weights)
                    assert name == part.view.name
                    write_all(fd, _bytes(tensor), part.offset)
                    reporter.advance(part.nbytes)
                os.fsync(fd)
            finally:
                os.close(fd)
            stage.record(file.name)
        assert next(weights, None) is None
        finish(stage, plan, Provenance(LIVE, None, {"max_shard_size": max_shard_size}))
    reporter.end()
    stage.check_output()


def _opened(stage: Stage) -> Stage:
    with cleaning_up(stage):
        stage.open()
    return stage


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _dtype(live: LiveModel) -> str:
    return str(live.shards[0].data.dtype).removeprefix("torch.")


def save_megatron(
    chunks: Sequence[torch.nn.Module],
    bridge: ModelBridge,
    destination: str | Path,
    *,
    artifacts_folder: AnyPath | None = None,
    iteration: int = 0,
) -> None:
    """Save with stock megatron-core, for it, Megatron-LM and ``export`` to load. Collective.

    megatron-core starts helper processes, so the calling script needs the guard
    ``if __name__ == "__main__"``.

    Args:
        chunks, bridge, artifacts_folder: as for :func:`save_hf`.
        destination: checkpoint root to create.
        iteration: number of training steps behind the weights.

    Raises:
        OutputError: ``destination`` exists.
    """
    root = Path(destination).expanduser().resolve()
    # As in storage.stage: an empty folder is used as it is.
    stage = root if root.is_dir() else root.with_name(root.name + PARTIAL)
    folder = stage / f"iter_{iteration:07d}"
    lock = on_first(lambda: _begin(root, stage, folder))
    try:
        state, texts = megatron_state(
            chunks, bridge, artifacts_folder=artifacts_folder, iteration=iteration
        )
        dist_checkpointing.save(state, str(folder), content_metadata=ON_DISK)
        wait_for_all()
        on_first(lambda: _commit(root, stage, folder, texts, iteration))
    finally:
        if lock is not None:
            lock.release()


def megatron_state(
    chunks: Sequence[torch.nn.Module],
    bridge: ModelBridge,
    *,
    artifacts_folder: AnyPath | None = None,
    iteration: int = 0,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what a Megatron checkpoint of a live model holds. Collective.

    Args:
        chunks, bridge, artifacts_folder, iteration: as for :func:`save_megatron`.

    Returns:
        The state for ``dist_checkpointing.save``, and the small files of the checkpoint.
    """
    live = LiveModel.of(chunks, bridge)
    dtype = _dtype(live)
    # The first process has the embedding, and so knows its number of padded rows.
    padded = [live.mapping.parameters[bridge.vocab_param].shape[0]]
    dist.broadcast_object_list(padded, 0)
    rows = padded[0]
    state: dict[str, Any] = {
        "args": Namespace(**bridge.megatron_args(rows, dtype)),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        **model_states(chunks),
    }
    artifacts = output_artifacts(bridge.hf_config, dtype, artifacts_folder)
    texts = {f"{HF_SUBFOLDER}/{name}": data for name, data in artifacts.items()}
    run_config = {"model": bridge.run_config_model(rows, dtype)}
    texts[RUN_CONFIG] = yaml.safe_dump(run_config, sort_keys=False).encode()
    return state, texts


def model_states(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state dicts of the chunks, under Megatron-LM's names."""
    unwrapped = unwrap_model(list(chunks))
    return {
        "model" if len(unwrapped) == 1 else f"model{i}": chunk.sharded_state_dict()
        for i, chunk in enumerate(unwrapped)
    }


def _begin(root: Path, stage: Path, folder: Path) -> Lock:
    check_name(root)
    if not is_vacant(root):
        raise OutputError(f"{root}: exists already; name another folder")
    if not is_vacant(stage):
        raise OutputError(f"{stage}: is in the way, and no save's. Move it away.")
    stage.mkdir(parents=True, exist_ok=True)
    lock = take(stage / PARTIAL_MARKER, is_journal=True)
    try:
        clear(stage)  # left by an interrupted save
        folder.mkdir()
    except BaseException:
        lock.release()
        raise
    return lock


def _commit(root: Path, stage: Path, folder: Path, texts: dict[str, bytes], iteration: int) -> None:
    write_texts(folder, texts)
    sync_tree(folder)
    sync(stage)
    if stage != root:
        stage.rename(root)
        sync(root.parent)
    write_synced(root / TRACKER, str(iteration))
    (root / PARTIAL_MARKER).unlink()
    sync(root)
    open_checkpoint(root)  # raises unless the model is complete


def write_texts(folder: Path, texts: dict[str, bytes]) -> None:
    """Write small files into a folder, given by their names in it."""
    for name, data in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
