"""What a run's checkpoint holds besides the weights, and how it is loaded at any layout."""

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

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder
from megatron_olmo_bridge.live.save import model_states
from megatron_olmo_bridge.runtime.process_groups import on_first

from .checksums import check
from .optimizer_state import (
    check_loadable,
    check_parts,
    content_metadata,
    is_distributed,
    is_fully_reshardable,
    optimizer_state,
)

PROGRESS = "olmo_bridge_progress"
"""Key of what this package adds: the layout, and what the watch over the loss remembers."""


def load(
    folder: Path, chunks: Sequence[Any], optimizer: Any, *, fresh_rng: bool = False
) -> dict[str, Any]:
    """Set a model and its optimizer from a run's checkpoint.

    Where the optimizer's state is fully reshardable, the layout may be any; else only the
    data-parallel size may differ from what it was.

    Args:
        folder: an iteration's.
        chunks: as ``provide_distributed_model`` returns them.
        optimizer: of the chunks.
        fresh_rng: leave the random numbers as they are.

    Returns:
        The ``progress`` that :meth:`Checkpointer.save` stored.

    Raises:
        InputError: its optimizer's state is of another kind, or of another layout.
        FormatError: it is damaged, or of another model.
    """
    with _translate_load_errors(folder):
        check(folder)
        on_first(lambda: _check(folder))
        return _loaded(folder, chunks, optimizer, fresh_rng)


def _check(folder: Path) -> None:
    """Look at the headers; they say better what is wrong than what torch raises later."""
    if "optimizer" not in TorchDistFolder.read(folder).common:
        raise FormatError(
            f"{folder}: has no optimizer state: it is damaged, or was saved without one; then "
            "leave out init.optimizer"
        )


def _loaded(folder: Path, chunks: Sequence[Any], optimizer: Any, fresh_rng: bool) -> dict[str, Any]:
    common = dist_checkpointing.load_common_state_dict(str(folder))
    progress: dict[str, Any] = common.get(PROGRESS, {})
    distributed = progress.get("distributed_optimizer")
    if distributed is not None and distributed != is_distributed(optimizer):
        raise InputError(
            f"{folder}: its optimizer's state is of parallel.distributed_optimizer="
            f"{str(distributed).lower()}, and can be loaded with that only"
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
    loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(unwrap_model(list(chunks))):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])
    _keep_settings(optimizer.param_groups, loaded["optimizer"])
    # megatron-core loads a dp_reshardable state in place, and leaves it to others to say no_grad.
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for part in with_torch:
            stack.enter_context(_keeping_steps(part))
        optimizer.load_state_dict(loaded["optimizer"])
    if with_rng:
        _set_rng_state(loaded["rng_state"])
    return progress


def saved_content(folder: Path) -> dict[str, Any]:
    """Return ``content_metadata`` of a checkpoint; empty where it has none."""
    return dist_checkpointing.load_content_metadata(str(folder)) or {}


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


def _keep_settings(groups: list[dict[str, Any]], loaded: Any) -> None:
    """Replace loaded settings (learning rate, betas, decay) with those of the config.

    megatron-core would take them, the peak learning rate too, from the checkpoint; 0.19 would not
    even find the parameter groups of other rates.
    """
    configured = {_kind(group): group for group in groups}
    for group in _param_groups(loaded):
        for name, value in configured.get(_kind(group), {}).items():
            if name not in ("params", "step"):
                group[name] = value


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells the parameter groups of a model apart."""
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
    """Turn what torch and megatron-core raise of damaged files, anything, into one sentence."""
    try:
        yield
    except (BridgeError, torch.OutOfMemoryError):
        raise
    except (Exception, CheckpointException) as error:
        why = str(error)
        if isinstance(error, CheckpointException):  # here all processes are told why
            why = next((str(e) for e, _ in error.failures.values()), "another process failed")
        raise FormatError(
            f"{folder}: can't be loaded; it is damaged, or of another model: "
            f"{why.strip().partition(chr(10))[0]:.300}"
        ) from error
