"""A run's checkpoints: whole or not there, and enough to continue as if nothing had happened.

They are Megatron checkpoints (``torch_dist``): weights, optimizer, random numbers. ``olmo-bridge
export`` reads them, and so does Megatron-LM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.utils import nested_values
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, OutputError
from megatron_olmo_bridge.formats.detect import PARTIAL_MARKER
from megatron_olmo_bridge.formats.torch_dist import TRACKER, TorchDistFolder, iteration_folders
from megatron_olmo_bridge.live.save import ON_DISK, megatron_state, model_states, write_texts
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.runtime.process_groups import on_first
from megatron_olmo_bridge.runtime.signals import sheltered

CONTENT = ON_DISK | {"distrib_optim_sharding_type": "fully_reshardable"}
"""``content_metadata``: what the optimizer keeps can be loaded at any other layout."""
PROGRESS = "olmo_bridge_progress"
"""Key of what this package adds: the layout, and what the watch over the loss remembers."""
_SUFFIX = ".partial"


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

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Write a checkpoint, or begin to.

        Args:
            step: optimizer steps that are in the weights.
            progress: plain values to have back from :meth:`restore`.

        Raises:
            OutputError: it can't be written; what was saved before is as it was.
        """
        self.finish()
        folder = iteration_folder(self.root, step)
        partial = folder.with_name(folder.name + _SUFFIX)
        state, texts = megatron_state(self.chunks, self.bridge, beside=self.beside, iteration=step)
        state["optimizer"] = _optimizer_state(self.optimizer, self.chunks, is_loading=False)
        state["rng_state"] = _rng_state()
        state[PROGRESS] = progress | {
            "layout": layout(),
            "distributed_optimizer": _is_distributed(self.optimizer),
        }
        needed = _bytes(state)
        with _saying_what_fails(self.root), sheltered():
            on_first(lambda: _begin(partial, needed))
            request = dist_checkpointing.save(
                state, str(partial), content_metadata=CONTENT, async_sharded_save=self.asynchronous
            )

        def commit() -> None:
            on_first(lambda: self._commit(partial, folder, texts, step))

        if isinstance(request, AsyncRequest):
            request.add_finalize_fn(commit)
            self._queue.schedule_async_request(request)
        else:
            dist.barrier()
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
            InputError: the checkpoint is of another model.
        """
        try:
            return load(iteration_folder(self.root, step), self.chunks, self.optimizer)
        except FormatError as error:
            raise FormatError(
                f"{error}\nTo go on from an earlier checkpoint, write its number into "
                f"{self.root / TRACKER}."
            ) from error

    def _commit(self, partial: Path, folder: Path, texts: dict[str, bytes], step: int) -> None:
        write_texts(partial, texts)
        (partial / PARTIAL_MARKER).unlink()
        for path in (partial, *partial.rglob("*")):
            _sync(path)
        if folder.exists():  # of a run that went on from an earlier step
            _delete(folder)
        partial.rename(folder)
        tracker = self.root / (TRACKER + _SUFFIX)
        tracker.write_text(str(step))
        _sync(tracker)
        tracker.replace(self.root / TRACKER)
        _sync(self.root)
        if self.keep_last:
            complete = [p for p in iteration_folders(self.root) if p <= folder]
            for old in complete[: -self.keep_last]:
                _delete(old)
        self.on_saved(step, folder)


def load(
    folder: Path, chunks: Sequence[Any], optimizer: Any, *, fresh_rng: bool = False
) -> dict[str, Any]:
    """Set a model and its optimizer from a run's checkpoint, saved at any layout.

    Args:
        folder: an iteration's.
        chunks: as ``provide_distributed_model`` returns them.
        optimizer: of the chunks.
        fresh_rng: leave the random numbers as they are.

    Returns:
        What :meth:`Checkpointer.save` was given.

    Raises:
        InputError: it has no optimizer, or one that is kept otherwise.
        FormatError: it is damaged, or of another model.
    """
    on_first(lambda: _check(folder))
    with _saying_what_is_damaged(folder):
        return _loaded(folder, chunks, optimizer, fresh_rng)


def _check(folder: Path) -> None:
    """Look at the headers; they say better what is wrong than what torch raises later."""
    if "optimizer" not in TorchDistFolder.read(folder).common:
        raise FormatError(
            f"{folder}: has no optimizer's state: it is damaged, or was saved without one; then "
            "leave out init.optimizer"
        )


def _loaded(folder: Path, chunks: Sequence[Any], optimizer: Any, fresh_rng: bool) -> dict[str, Any]:
    common = dist_checkpointing.load_common_state_dict(str(folder))
    progress: dict[str, Any] = common.get(PROGRESS, {})
    distributed = progress.get("distributed_optimizer")
    if distributed is not None and distributed != _is_distributed(optimizer):
        raise InputError(
            f"{folder}: its optimizer's state is of parallel.distributed_optimizer="
            f"{str(distributed).lower()}, and can be loaded with that only"
        )
    with_torch = _torch_optimizers(optimizer)
    for part in with_torch:
        _allocate(part.optimizer)
    state = model_states(chunks)
    state["optimizer"] = _optimizer_state(optimizer, chunks, is_loading=True)
    with_rng = progress.get("layout") == layout() and not fresh_rng
    if with_rng:
        state["rng_state"] = _rng_state()
    loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(unwrap_model(list(chunks))):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])
    with contextlib.ExitStack() as stack:
        for part in with_torch:
            stack.enter_context(_keeping_steps(part))
        stack.enter_context(_keeping_settings(optimizer))
        optimizer.load_state_dict(loaded["optimizer"])
    if with_rng:
        _set_rng_state(loaded["rng_state"])
    return progress


def _optimizer_state(optimizer: Any, chunks: Sequence[Any], is_loading: bool) -> Any:
    models = model_states(chunks)  # anew: those that are saved are taken apart by that
    return optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=CONTENT)


def _is_distributed(optimizer: Any) -> bool:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(isinstance(part, DistributedOptimizer) for part in parts)


def _torch_optimizers(optimizer: Any) -> list[Any]:
    """The parts of megatron-core's optimizer that have torch's AdamW inside: all of them where
    there is neither Transformer Engine nor Apex."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part.optimizer, torch.optim.AdamW)]


def _allocate(inner: torch.optim.AdamW) -> None:
    """Give an optimizer that has not taken a step the state to load into: megatron-core takes it
    for granted, as Transformer Engine's has it at once."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextlib.contextmanager
def _keeping_steps(part: Any) -> Iterator[None]:
    """Let a distributed optimizer load the ``step`` that torch's AdamW keeps by parameter.

    megatron-core 0.16 and 0.19 look for it among the tensors of a checkpoint, in vain, and then
    leave all parameters with the same tensor, which each of them counts up.
    """
    name = "_set_main_param_and_optimizer_states"
    original = getattr(part, name, None)
    if original is None:
        yield
        return

    def with_step(parameter: Any, tensors: dict[str, Any]) -> None:
        group, index = part.model_param_group_index_map[parameter]
        main = part.optimizer.param_groups[group]["params"][index]
        original(parameter, tensors | {"step": part.optimizer.state[main]["step"]})

    setattr(part, name, with_step)
    try:
        yield
    finally:
        delattr(part, name)
    for state in part.optimizer.state.values():
        state["step"] = state["step"].clone()


@contextlib.contextmanager
def _keeping_settings(optimizer: Any) -> Iterator[None]:
    """Load moments and steps, but leave learning rate, betas, decay and so on as the config has
    them: megatron-core would take the peak learning rate from the checkpoint too."""
    before = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    yield
    for group, values in zip(optimizer.param_groups, before, strict=True):
        group.update(values)


def layout() -> list[int]:
    """Processes, and tensor, pipeline and expert parallel size."""
    return [
        dist.get_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    ]


def _rng_state() -> ShardedObject:
    """This process's random numbers; data-parallel replicas each have their own."""
    state = {
        "torch": torch.get_rng_state(),
        "tracked": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng_state", state, (dist.get_world_size(),), (dist.get_rank(),))


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracked"])


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

    Also keeps back its warning of an "incomplete / corrupted checkpoint": our marker is there.
    """
    logger = logging.getLogger(dist_checkpointing.serialization.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, CheckpointException) as error:
        why = error.strerror if isinstance(error, OSError) else _failure(error)
        if dist.get_rank() == 0:
            _clean(root)
        raise OutputError(
            f"{root}: can't save a checkpoint: {why or error}. Those that were saved before are "
            "complete: free some space, or set checkpoint.keep_last, and start the same command "
            "again."
        ) from error
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _saying_what_is_damaged(folder: Path) -> Iterator[None]:
    """Turn what torch and megatron-core raise of damaged files, anything, into one sentence."""
    try:
        yield
    except (BridgeError, torch.OutOfMemoryError):
        raise
    except (Exception, CheckpointException) as error:
        why = _failure(error) if isinstance(error, CheckpointException) else str(error)
        raise FormatError(
            f"{folder}: can't be loaded; it is damaged, or of another model: "
            f"{why.strip().partition(chr(10))[0]:.300}"
        ) from error


def _failure(error: CheckpointException) -> str:
    """What went wrong in the first process that says so; only the first one is told."""
    return next((str(e) for e, _ in error.failures.values()), "another process failed")


def _delete(folder: Path) -> None:
    """Delete a checkpoint, of which a kill leaves nothing that looks like one."""
    doomed = folder.with_name(f"{folder.name}.old{_SUFFIX}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _clean(root: Path) -> None:
    """Delete what saves and deletions that were interrupted left behind."""
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


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
