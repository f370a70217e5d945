"""A run's checkpoints: whole or not there, and enough to continue as if nothing had happened.

They are Megatron checkpoints (``torch_dist``): weights, optimizer, random numbers. ``olmo-bridge
export`` reads them, and so does Megatron-LM.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.utils import nested_values
from torch.distributed.checkpoint.api import CheckpointException

from megatron_olmo_bridge.convert.stage import sync
from megatron_olmo_bridge.errors import FormatError, InputError, OutputError
from megatron_olmo_bridge.formats.detect import PARTIAL_MARKER
from megatron_olmo_bridge.formats.iterations import TRACKER, iteration_folders
from megatron_olmo_bridge.live.save import megatron_state, write_texts
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.runtime.process_groups import on_first, wait_for_all
from megatron_olmo_bridge.runtime.signals import sheltered

from .optimizer_state import (
    content_metadata,
    is_distributed,
    is_fully_reshardable,
    model_parallel_layout,
    optimizer_state,
)
from .restore import PROGRESS, layout, load, rng_state, saved_content

_SUFFIX = ".partial"
_REPLACED = f".replaced{_SUFFIX}"
"""Ends the name of a complete checkpoint while another one of the same step takes its place."""
_STRATEGY = {"async_strategy": "mcore"}
"""0.19 would use NVIDIA's resiliency extension, another package, unless told otherwise."""
if "async_strategy" not in inspect.signature(dist_checkpointing.save).parameters:
    _STRATEGY.clear()


def iteration_folder(root: Path, step: int) -> Path:
    """Where a step's checkpoint is."""
    return root / f"iter_{step:07d}"


def last_step(root: Path) -> int | None:
    """The step of the newest complete checkpoint under a run's folder.

    Raises:
        InputError: the tracker names one that isn't there.
    """
    if not (root / TRACKER).is_file():  # or killed between the first checkpoint and the tracker
        complete = iteration_folders(root) if root.is_dir() else []
        return int(complete[-1].name.removeprefix("iter_")) if complete else None
    text = (root / TRACKER).read_text().strip()
    if not text.isdigit() or not iteration_folder(root, int(text)).is_dir():
        raise InputError(
            f"{root / TRACKER}: says {text!r:.20}, but there is no such checkpoint. Write the "
            "number of one that is there into it."
        )
    return int(text)


@dataclass
class Checkpointer:
    """Saves and restores one run. All processes call its methods.

    Attributes:
        root: the run's folder.
    """

    root: Path
    bridge: ModelBridge
    chunks: Sequence[Any]
    optimizer: Any
    beside: Path | None = None
    """Folder with tokenizer files, to be kept with the weights."""
    keep_last: int | None = None
    asynchronous: bool = False
    on_saved: Callable[[int, Path], None] = lambda step, folder: None
    """Called in the first process when a checkpoint is complete."""
    _queue: AsyncCallsQueue = field(default_factory=AsyncCallsQueue)

    def save(self, step: int, progress: dict[str, Any], *, fully_reshardable: bool) -> None:
        """Write a checkpoint, or begin to.

        Args:
            step: optimizer steps that are in the weights.
            progress: plain values to have back from :meth:`restore`.
            fully_reshardable: at any layout. Else it can be resumed at another data-parallel size,
                and takes less memory to save; see :mod:`.optimizer_state`.

        Raises:
            OutputError: it can't be written; what was saved before is as it was.
        """
        self.finish()
        folder = iteration_folder(self.root, step)
        partial = folder.with_name(folder.name + _SUFFIX)
        state, texts = megatron_state(self.chunks, self.bridge, beside=self.beside, iteration=step)
        metadata = content_metadata(self.optimizer, fully_reshardable=fully_reshardable)
        state["optimizer"] = optimizer_state(
            self.optimizer, self.chunks, metadata, is_loading=False
        )
        state["rng_state"] = rng_state()
        state[PROGRESS] = progress | {
            "layout": layout(),
            "distributed_optimizer": is_distributed(self.optimizer),
            "model_parallel_layout": model_parallel_layout(self.chunks),
        }
        needed = _bytes(state)
        with _saying_what_fails(self.root), sheltered():
            on_first(lambda: _begin(partial, needed))
            request = dist_checkpointing.save(
                state, str(partial), content_metadata=metadata,
                async_sharded_save=self.asynchronous, **_STRATEGY,
            )  # fmt: skip

        def commit() -> None:
            on_first(lambda: self._commit(partial, folder, texts, step))

        if isinstance(request, AsyncRequest):
            request.add_finalize_fn(commit)
            self._queue.schedule_async_request(request)
        else:
            wait_for_all()
            with _saying_what_fails(self.root):
                commit()

    def poll(self) -> None:
        """Complete a checkpoint that was written meanwhile, if it is ready in every process."""
        with _saying_what_fails(self.root):
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a checkpoint that is being written."""
        with _saying_what_fails(self.root):
            self._queue.maybe_finalize_async_calls(blocking=True)

    def restore(self, step: int) -> dict[str, Any]:
        """Set model, optimizer and random numbers to what they were; returns the progress.

        At another layout the random numbers, of which dropout alone is made, begin anew.

        Raises:
            InputError: the checkpoint's optimizer state can't be loaded at this layout.
        FormatError: it is damaged, or of another model.
        """
        try:
            return load(iteration_folder(self.root, step), self.chunks, self.optimizer)
        except FormatError as error:
            raise FormatError(
                f"{error}\nTo go on from an earlier checkpoint, write its number into "
                f"{self.root / TRACKER}."
            ) from error

    def is_fully_reshardable(self, step: int) -> bool:
        """Whether a step's checkpoint can be resumed at any layout."""
        return is_fully_reshardable(saved_content(iteration_folder(self.root, step)))

    def _commit(self, partial: Path, folder: Path, texts: dict[str, bytes], step: int) -> None:
        write_texts(partial, texts)
        (partial / PARTIAL_MARKER).unlink()
        for path in (partial, *partial.rglob("*")):
            sync(path)
        replaced = folder.with_name(folder.name + _REPLACED)
        if folder.exists():  # of a run that went on from an earlier step, or saved again
            folder.rename(replaced)
        partial.rename(folder)
        tracker = self.root / (TRACKER + _SUFFIX)
        tracker.write_text(str(step))
        sync(tracker)
        tracker.replace(self.root / TRACKER)
        sync(self.root)
        if replaced.exists():
            _delete(replaced)
        if self.keep_last:
            complete = [p for p in iteration_folders(self.root) if p <= folder]
            for old in complete[: -self.keep_last]:
                _delete(old)
        self.on_saved(step, folder)


def _begin(partial: Path, needed: int) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    _clean(partial.parent)
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        raise OutputError(
            f"{partial.parent}: a checkpoint takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB "
            "are free. The checkpoints before it are complete: free some space, or set "
            "checkpoint.keep_last, and start the same command again."
        )
    partial.mkdir()
    (partial / PARTIAL_MARKER).touch()


@contextlib.contextmanager
def _saying_what_fails(root: Path) -> Iterator[None]:
    """Turn what megatron-core raises of a full disk into one sentence, and leave nothing behind.

    Also keeps back its warnings: of an "incomplete / corrupted checkpoint", as our marker is
    there, and of the asynchronous writer, which is the only one without a further package.
    """
    logger = logging.getLogger(dist_checkpointing.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, CheckpointException) as error:
        why = _failure(error)
        free = shutil.disk_usage(root).free
        if dist.get_rank() == 0:
            _clean(root)
        raise OutputError(
            f"{root}: can't save a checkpoint: {why}; {free / 1e9:.2f} GB are free. Those that "
            "were saved before are complete: free some space, or set checkpoint.keep_last, and "
            "start the same command again."
        ) from error
    finally:
        logger.setLevel(before)


def _failure(error: OSError | CheckpointException) -> str:
    """Why a save failed. Then all processes fail, but only the first one is told why."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    told = [next((str(e) for e, _ in error.failures.values()), "")]
    dist.broadcast_object_list(told, 0)
    return told[0]


def _delete(folder: Path) -> None:
    """Delete a checkpoint, of which a kill leaves nothing that looks like one."""
    doomed = folder.with_name(f"{folder.name}.old{_SUFFIX}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def put_back(root: Path) -> None:
    """Give its name back to a checkpoint whose replacement was interrupted between two renames."""
    for replaced in root.glob(f"iter_*{_REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if not folder.exists():
            replaced.rename(folder)


def _clean(root: Path) -> None:
    """Delete what saves and deletions that were interrupted left behind."""
    put_back(root)
    for path in root.glob(f"iter_*{_SUFFIX}"):
        shutil.rmtree(path)


def _bytes(state: dict[str, Any]) -> int:
    """Bytes of all processes' tensors, each counted once."""
    parts = (ShardedTensor, ShardedTensorFactory)
    mine = sum(
        value.data.nbytes
        for value in nested_values(state)
        if isinstance(value, parts) and is_main_replica(value.replica_id)
    )
    total = torch.tensor(float(mine), dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total)
