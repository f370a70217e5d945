"""Write a live model to disk, as a Hugging Face or a Megatron checkpoint; whole or not at all."""

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
from megatron_olmo_bridge.formats.tensors import TensorSpec
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.runtime.process_groups import on_first, wait_for_all
from megatron_olmo_bridge.storage.atomic import PARTIAL, sync, sync_tree, write_synced
from megatron_olmo_bridge.storage.execute import cleaning_up, finish
from megatron_olmo_bridge.storage.plan import CopyPlan, Literal
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import LIVE, Provenance
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER, Stage, clear, is_vacant
from megatron_olmo_bridge.storage.transfer import write_all

from .export import stream_weights
from .shards import LiveModel

ON_DISK = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""``content_metadata``: layers stacked, as :mod:`convert.to_megatron` writes them too."""


def save_hf(
    chunks: Sequence[torch.nn.Module],
    bridge: ModelBridge,
    destination: str | Path,
    *,
    artifacts_folder: Path | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> None:
    """Write the weights as ``save_pretrained`` would; all processes call it, the first one writes.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        bridge: of the model.
        destination: the folder to make.
        artifacts_folder: folder with config.json and tokenizer files to copy.
        max_shard_size: bytes, or a text such as ``5GB``.
        overwrite: replace what is at ``destination``.
        reporter: told of the bytes written.

    Raises:
        OutputError: the output exists, or the disk is too small; then nothing is left of it.
    """
    reporter = reporter or Reporter()
    live = LiveModel.of(chunks, bridge)
    dtype = _dtype(live)
    specs = {n: TensorSpec(n, shape, dtype) for n, shape in live.mapping.hf_shapes.items()}
    files = shards(specs, "keep", parse_size(max_shard_size))
    texts = index_of(files) | output_artifacts(bridge.hf_config, dtype, artifacts_folder)
    plan = CopyPlan("export", artifacts_folder, files, texts, ".")
    target = Path(destination).expanduser()
    # What a killed save left is of other weights, perhaps: begin anew.
    anew = overwrite or is_vacant(target)
    stage = on_first(lambda: _opened(Stage(target, plan, resume=False, overwrite=anew)))
    weights = stream_weights(chunks, bridge, names=specs, to=0, cpu=True)
    if stage is None:
        for _ in weights:
            raise AssertionError("only the first process is given the weights")
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
    artifacts_folder: Path | None = None,
    iteration: int = 0,
) -> None:
    """Save with stock megatron-core, in a form that it, Megatron-LM and ``export`` load.

    All processes call it. megatron-core starts helper processes for it: the calling script needs
    the guard ``if __name__ == "__main__"``.

    Args:
        chunks, bridge, artifacts_folder: as for :func:`save_hf`.
        destination: the checkpoint root to make.
        iteration: number of training steps that are in the weights.

    Raises:
        OutputError: there is something at ``destination``.
    """
    root = Path(destination).expanduser().resolve()
    # As in storage.stage: an empty folder stays the folder that it is.
    stage = root if root.is_dir() else root.with_name(root.name + PARTIAL)
    folder = stage / f"iter_{iteration:07d}"
    on_first(lambda: _begin(root, stage, folder))
    state, texts = megatron_state(
        chunks, bridge, artifacts_folder=artifacts_folder, iteration=iteration
    )
    dist_checkpointing.save(state, str(folder), content_metadata=ON_DISK)
    wait_for_all()
    on_first(lambda: _commit(root, stage, folder, texts, iteration))


def megatron_state(
    chunks: Sequence[torch.nn.Module],
    bridge: ModelBridge,
    *,
    artifacts_folder: Path | None = None,
    iteration: int = 0,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a Megatron checkpoint of a live model holds; all processes call it.

    Args:
        chunks, bridge, artifacts_folder, iteration: as for :func:`save_megatron`.

    Returns:
        The state for ``dist_checkpointing.save``, and the small files that belong beside it.
    """
    live = LiveModel.of(chunks, bridge)
    dtype = _dtype(live)
    # The first process has the embedding, and so knows to how many rows it is padded.
    padded = [live.mapping.parameters[bridge.vocab_param].shape[0]]
    dist.broadcast_object_list(padded, 0)
    rows = padded[0]
    state: dict[str, Any] = {
        "args": Namespace(**bridge.megatron_record.args(rows, dtype)),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        **model_states(chunks),
    }
    artifacts = output_artifacts(bridge.hf_config, dtype, artifacts_folder)
    texts = {f"{HF_SUBFOLDER}/{name}": data for name, data in artifacts.items()}
    run_config = {"model": bridge.megatron_record.run_config(rows, dtype)}
    texts[RUN_CONFIG] = yaml.safe_dump(run_config, sort_keys=False).encode()
    return state, texts


def model_states(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The chunks' sharded state dicts, by the names that Megatron-LM gives them."""
    unwrapped = unwrap_model(list(chunks))
    return {
        "model" if len(unwrapped) == 1 else f"model{i}": chunk.sharded_state_dict()
        for i, chunk in enumerate(unwrapped)
    }


def _begin(root: Path, stage: Path, folder: Path) -> None:
    check_name(root)
    if not is_vacant(root):
        raise OutputError(f"{root}: exists already; name another folder")
    if not is_vacant(stage):
        raise OutputError(f"{stage}: is in the way, and no save's. Move it away.")
    stage.mkdir(parents=True, exist_ok=True)
    (stage / PARTIAL_MARKER).touch()
    clear(stage)  # of a save that was killed
    folder.mkdir()


def _commit(root: Path, stage: Path, folder: Path, texts: dict[str, bytes], iteration: int) -> None:
    write_texts(folder, texts)
    sync_tree(stage)
    if stage != root:
        stage.rename(root)
        sync(root.parent)
    write_synced(root / TRACKER, str(iteration))
    (root / PARTIAL_MARKER).unlink()
    sync(root)
    open_checkpoint(root)  # raises unless all of the model is there


def write_texts(folder: Path, texts: dict[str, bytes]) -> None:
    """Write small files into a folder, by their names in it."""
    for name, data in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
