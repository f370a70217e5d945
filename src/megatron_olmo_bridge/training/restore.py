"""Restore model, optimizer and random states from a run's checkpoint, at any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.megatron import MegatronCheckpoint
from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError
from megatron_olmo_bridge.formats.remote_path import here
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder
from megatron_olmo_bridge.live.save import model_states
from megatron_olmo_bridge.live.strategy import as_megatron
from megatron_olmo_bridge.runtime.process_groups import on_first

from .checksums import check
from .optimizer_state import (
    check_loadable,
    check_parts,
    content_metadata,
    is_distributed,
    is_fully_reshardable,
    optimizer_state,
    parts_of,
    saved_parts,
)

PROGRESS = "olmo_bridge_progress"
"""Key of what this package adds: the layout, and the state of spike detection."""


def load(
    folder: Path, chunks: Sequence[Any], optimizer: Any, *, fresh_rng: bool = False
) -> dict[str, Any]:
    """Set a model and its optimizer from a run's checkpoint.

    If the optimizer state is fully reshardable, the layout may be any; otherwise only the
    data-parallel size may differ.

    Args:
        folder: folder of an iteration.
        chunks: as ``provide_distributed_model`` returns them.
        optimizer: optimizer of the chunks.
        fresh_rng: don't restore the random states.

    Returns:
        The ``progress`` that :meth:`Checkpointer.save` stored.

    Raises:
        InputError: the optimizer state is of another kind or layout.
        FormatError: the checkpoint is damaged, or of another model.
    """
    with _translate_load_errors(folder):
        check(folder)
        on_first(lambda: _check_has_optimizer_state(folder))
        return _loaded(folder, chunks, optimizer, fresh_rng)


def load_initial(source: Checkpoint, chunks: Sequence[Any], optimizer: Any) -> None:
    """Set a model and its optimizer from any checkpoint that has optimizer state.

    Raises:
        InputError: it has none, or the optimizer state is of another kind or layout.
        FormatError: the checkpoint is damaged, or of another model.
    """
    count, path = len(parts_of(optimizer)), here(source.path)
    if isinstance(source, MegatronCheckpoint):
        with _translate_load_errors(path):
            same_parts = (
                saved_parts(TorchDistFolder.read(path).common.get("optimizer", {})) == count
            )
        if same_parts:
            load(path, chunks, optimizer, fresh_rng=True)
            return
    with (
        _translate_load_errors(path),
        as_megatron(source, source.optimizer_state, count) as (folder, strategy),
    ):
        _loaded(Path(folder), chunks, optimizer, True, strategy)


def _check_has_optimizer_state(folder: Path) -> None:
    """Check by the headers, because torch's later error would be less clear."""
    if "optimizer" not in TorchDistFolder.read(folder).common:
        raise FormatError(
            f"{folder}: has no optimizer state. Either it is damaged, or it was saved without "
            "one; in the second case leave out init.optimizer"
        )


def _loaded(
    folder: Path, chunks: Sequence[Any], optimizer: Any, fresh_rng: bool, strategy: Any = None
) -> dict[str, Any]:
    common = dist_checkpointing.load_common_state_dict(str(folder))
    progress: dict[str, Any] = common.get(PROGRESS, {})
    distributed = progress.get("distributed_optimizer")
    if distributed is not None and distributed != is_distributed(optimizer):
        raise InputError(
            f"{folder}: its optimizer state was saved with parallel.distributed_optimizer="
            f"{str(distributed).lower()}, and can be loaded only with that setting"
        )
    for_any_layout = is_fully_reshardable(saved_content(folder))
    if not for_any_layout:
        check_loadable(folder, progress.get("model_parallel_layout"), chunks)
    check_parts(folder, common["optimizer"], optimizer)
    with_torch = _torch_optimizers(optimizer)
    for part in with_torch:
        _allocate(part.optimizer)
    state = model_states(chunks)
    metadata = content_metadata(optimizer, fully_reshardable=for_any_layout)
    state["optimizer"] = optimizer_state(optimizer, chunks, metadata, is_loading=True)
    with_rng = progress.get("layout") == layout() and not fresh_rng
    if with_rng:
        state["rng_state"] = rng_state()
    loaded = dist_checkpointing.load(state, str(folder), sharded_strategy=strategy)
    for i, chunk in enumerate(unwrap_model(list(chunks))):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])
    _keep_settings(optimizer.param_groups, loaded["optimizer"])
    # megatron-core loads a dp_reshardable state in place, without no_grad.
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for part in with_torch:
            stack.enter_context(_keeping_steps(part))
        optimizer.load_state_dict(loaded["optimizer"])
    if with_rng:
        _set_rng_state(loaded["rng_state"])
    return progress


def saved_content(folder: Path) -> dict[str, Any]:
    """Return the ``content_metadata`` of a checkpoint; empty if it has none."""
    return dist_checkpointing.load_content_metadata(str(folder)) or {}


def _torch_optimizers(optimizer: Any) -> list[Any]:
    """Return the parts of megatron-core's optimizer that use torch's AdamW: all of them if neither
    Transformer Engine nor Apex is installed."""
    return [p for p in parts_of(optimizer) if isinstance(p.optimizer, torch.optim.AdamW)]


def _allocate(inner: torch.optim.AdamW) -> None:
    """Allocate the state of an optimizer that has not taken a step yet.

    megatron-core expects it to exist, as with Transformer Engine's optimizer.
    """
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

    megatron-core 0.16 and 0.19 look for it among the tensors of a checkpoint, where it is not, and
    leave all parameters with one shared tensor, which each of them increments.
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


def _keep_settings(groups: list[dict[str, Any]], loaded: Any) -> None:
    """Replace loaded settings (learning rate, betas, decay) with those of the config.

    megatron-core would use those of the checkpoint, including the peak learning rate; 0.19 would
    not even match parameter groups with other rates.
    """
    configured = {_kind(group): group for group in groups}
    for group in _param_groups(loaded):
        for name, value in configured.get(_kind(group), {}).items():
            if name not in ("params", "step"):
                group[name] = value


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the values that identify a parameter group."""
    names = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
    return tuple(group.get(name) for name in names)


def _param_groups(state: Any) -> Iterator[dict[str, Any]]:
    for name, value in state.items() if isinstance(state, dict) else ():
        if name == "param_groups":
            yield from value
        else:
            yield from _param_groups(value)


def layout() -> list[int]:
    """Return world size, and tensor, pipeline and expert parallel size."""
    return [
        dist.get_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    ]


def rng_state() -> ShardedObject:
    """Return this process's random states; data-parallel replicas each have their own."""
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


@contextlib.contextmanager
def _translate_load_errors(folder: Path) -> Iterator[None]:
    """Raise a FormatError for any error of torch or megatron-core about damaged files."""
    try:
        yield
    except (BridgeError, torch.OutOfMemoryError):
        raise
    except (Exception, CheckpointException) as error:
        why = str(error)
        if isinstance(error, CheckpointException):  # all processes know why
            why = next((str(e) for e, _ in error.failures.values()), "another process failed")
        raise FormatError(
            f"{folder}: can't be loaded; it is damaged, or of another model: "
            f"{why.strip().partition(chr(10))[0]:.300}"
        ) from error
