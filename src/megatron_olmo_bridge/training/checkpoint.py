"""A run's checkpoints, written atomically and sufficient for exact resume.

They are Megatron checkpoints (``torch_dist``) with weights, optimizer and random states.
``olmo-bridge export`` reads them, and so does Megatron-LM.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import shlex
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
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.utils import nested_values
from torch.distributed.checkpoint.api import CheckpointException

from megatron_olmo_bridge.checkpoints.megatron_optimizer import RECORD
from megatron_olmo_bridge.errors import FormatError, InputError, OutputError
from megatron_olmo_bridge.formats import iterations
from megatron_olmo_bridge.formats.iterations import TRACKER
from megatron_olmo_bridge.live.save import megatron_state, write_texts
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.runtime.process_groups import gather, on_first
from megatron_olmo_bridge.runtime.signals import sheltered
from megatron_olmo_bridge.storage.atomic import PARTIAL, replace_file, sync, sync_tree
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER

from .checksums import recording, write_record
from .naming import clean, delete, take_name
from .optimizer_state import (
    content_metadata,
    is_distributed,
    is_fully_reshardable,
    model_parallel_layout,
    optimizer_state,
)
from .restore import PROGRESS, layout, load, rng_state, saved_content

_FULL = 2**20
"""Free bytes below which a disk counts as full."""
_STRATEGY = {"async_strategy": "mcore"}
"""0.19 would by default use NVIDIA's resiliency extension, a separate package."""
if "async_strategy" not in inspect.signature(dist_checkpointing.save).parameters:
    _STRATEGY.clear()


def iteration_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return root / f"iter_{step:07d}"


def last_step(root: Path) -> int | None:
    """Return the step of the newest complete checkpoint under a run's folder; None if it has none.

    Raises:
        InputError: the tracker names no existing checkpoint, or that is not a run's.
        FormatError: the tracker is not a small regular file.
    """
    if (root / TRACKER).exists():
        advice = "Write the number of one of them into it."
        last = iterations.iteration_folder(root, None, advice)
    else:  # perhaps killed between the first checkpoint and the tracker
        if steps := _saved_steps(root) if root.is_dir() else []:
            return steps[-1]
        last = root / iterations.RELEASE
        if not last.is_dir():
            return None
    step = iterations.iteration_number(last)
    if step is None:
        raise InputError(
            f"{last}: is not a checkpoint of a run. Name another folder as checkpoint.save, and "
            "this one as init.checkpoint."
        )
    return step


@dataclass
class Checkpointer:
    """Saves and restores a run. All methods are collective.

    Attributes:
        root: the run's folder.
    """

    root: Path
    bridge: ModelBridge
    chunks: Sequence[Any]
    optimizer: Any
    tokenizer_folder: Path | None = None
    """Folder with the tokenizer files that are saved with the weights."""
    keep_last: int | None = None
    asynchronous: bool = False
    on_saved: Callable[[int, Path], None] = lambda step, folder: None
    """Called in the first process after a checkpoint is complete."""
    _queue: AsyncCallsQueue = field(default_factory=AsyncCallsQueue)
    _partial: Path = Path()
    """Folder of the checkpoint that is being written."""
    _needed: int = 0
    """Bytes of the checkpoint that is being written."""

    def save(
        self,
        step: int,
        progress: dict[str, Any],
        record: dict[str, Any],
        *,
        fully_reshardable: bool,
    ) -> None:
        """Write a checkpoint, or start to write it if ``asynchronous``.

        Args:
            step: number of optimizer steps taken.
            progress: plain values that :meth:`restore` returns.
            record: plain values that ``export --to olmo-core`` needs.
            fully_reshardable: can be resumed at any layout; otherwise only at another data-parallel
                size, and saving takes less memory (see :mod:`.optimizer_state`).

        Raises:
            OutputError: it can't be written. Earlier checkpoints are not affected.
        """
        self.finish()
        folder = iteration_folder(self.root, step)
        partial = self._partial = folder.with_name(folder.name + PARTIAL)
        state, texts = megatron_state(
            self.chunks, self.bridge, artifacts_folder=self.tokenizer_folder, iteration=step
        )
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
        state[RECORD] = record
        self._needed = _bytes(state)
        on_first(lambda: self._begin(partial))
        with self._translate_errors(), sheltered():
            request = dist_checkpointing.save(
                state, str(partial), content_metadata=metadata, async_sharded_save=True, **_STRATEGY
            )
            request = recording(request, partial)
            request.add_finalize_fn(lambda: on_first(lambda: self._commit(partial, texts, step)))
            if self.asynchronous:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()

    def poll(self) -> None:
        """Commit an asynchronous checkpoint if every process has written its part."""
        with self._translate_errors():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, and commit it."""
        with self._translate_errors():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def restore(self, step: int) -> dict[str, Any]:
        """Restore model, optimizer and random states; return the progress.

        At another layout the random states, which only dropout uses, are not restored.

        Raises:
            InputError: the checkpoint's optimizer state can't be loaded at this layout.
            FormatError: it is damaged, or of another model; the message says how to resume from
                the previous one.
        """
        try:
            return load(iteration_folder(self.root, step), self.chunks, self.optimizer)
        except FormatError as error:
            raise FormatError(f"{error}\n{_earlier(self.root, step)}") from error

    def is_fully_reshardable(self, step: int) -> bool:
        """Return whether a step's checkpoint can be resumed at any layout."""
        return is_fully_reshardable(saved_content(iteration_folder(self.root, step)))

    def _begin(self, partial: Path) -> None:
        with self._translate_errors():
            self.root.mkdir(parents=True, exist_ok=True)
            clean(self.root)
            if shutil.disk_usage(self.root).free < self._needed:
                raise OutputError(f"{self.root}: {self._no_room()}")
            partial.mkdir()
            (partial / PARTIAL_MARKER).touch()

    def _commit(self, partial: Path, texts: dict[str, bytes], step: int) -> None:
        with self._translate_errors():
            folder = iteration_folder(self.root, step)
            write_texts(partial, texts)
            write_record(partial)
            (partial / PARTIAL_MARKER).unlink()
            sync_tree(partial)
            take_name(partial, folder)
            sync(self.root)
            replace_file(self.root / TRACKER, str(step))
            clean(self.root)  # removes a replaced checkpoint of the same step
            if self.keep_last:
                # Later steps remain from before the run was resumed at an earlier one.
                for old in [n for n in _saved_steps(self.root) if n <= step][: -self.keep_last]:
                    delete(iteration_folder(self.root, old))
        self.on_saved(step, folder)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise an OutputError for any error of a save, and delete the incomplete checkpoint.

        Also suppress two warnings of megatron-core: about an "incomplete / corrupted checkpoint"
        (because of the marker) and about the asynchronous writer.
        """
        logger = logging.getLogger(dist_checkpointing.__name__)
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except CheckpointException as error:  # all processes fail; only the first knows why
            why = next((str(e) for e, _ in error.failures.values()), "")
            if not self._partial.is_dir():  # megatron-core 0.19 names only the error's class
                why = f"{os.strerror(errno.ENOENT)}: {self._partial}"
            raise gather(self._failure(why))[0] from error
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise self._failure(f"{error.strerror or error}{where}") from error
        except RuntimeError as error:  # of torch.save
            raise self._failure(str(error)) from error
        finally:
            logger.setLevel(before)

    def _failure(self, why: str) -> OutputError:
        with contextlib.suppress(OSError):
            # torch.save doesn't say that the disk is full, so check before deleting anything.
            full = shutil.disk_usage(self.root).free < _FULL
            full |= any(os.strerror(number) in why for number in (errno.ENOSPC, errno.EDQUOT))
            if dist.get_rank() == 0:
                clean(self.root)
            if full or shutil.disk_usage(self.root).free < self._needed:
                why = f"{why}; {self._no_room()}"
                return OutputError(f"{self.root}: can't save a checkpoint: {why}")
        return OutputError(
            f"{self.root}: can't save a checkpoint: {why}. Earlier "
            "checkpoints are complete, and the same command resumes from the last of them."
        )

    def _no_room(self) -> str:
        free = shutil.disk_usage(self.root).free
        return (
            f"a checkpoint takes {self._needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. The "
            "earlier checkpoints are complete: free some space, or set checkpoint.keep_last, and "
            "start the same command again."
        )


def _saved_steps(root: Path) -> list[int]:
    """Return the steps that have a checkpoint, in order."""
    numbers = map(iterations.iteration_number, iterations.iteration_folders(root))
    return [number for number in numbers if number is not None]


def _earlier(root: Path, step: int) -> str:
    """Return how to resume from the checkpoint before a damaged one."""
    earlier = [n for n in _saved_steps(root) if n < step]
    if not earlier:
        return "There is no checkpoint before it: to start again, name another checkpoint.save."
    return (
        f"To resume from the checkpoint before it, that of step {earlier[-1]}, start the same "
        f"command again after\n  echo {earlier[-1]} > {shlex.quote(str(root / TRACKER))}"
    )


def _bytes(state: dict[str, Any]) -> int:
    """Return the bytes of the tensors of all processes, counting replicas once. Collective."""
    parts = (ShardedTensor, ShardedTensorFactory)
    held = sum(
        value.data.nbytes
        for value in nested_values(state)
        if isinstance(value, parts) and is_main_replica(value.replica_id)
    )
    total = torch.tensor(float(held), dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total)
