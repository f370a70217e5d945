"""Formats of the optimizer state in a checkpoint, and at which layouts each can be loaded.

megatron-core's distributed optimizer has two formats (``DistributedOptimizer.sharded_state_dict``):

- ``dp_reshardable``: each rank writes its part of the gradient buffers unchanged. Nothing is
  gathered, but the order in a buffer depends on the model-parallel layout, so only the
  data-parallel size may change.
- ``fully_reshardable``: the buffers are gathered and split into parameters, which can be loaded at
  any layout. One rank then holds the whole state of a tensor and pipeline shard.

An optimizer that is not distributed keeps its state by parameter, and so is fully reshardable.
megatron-core loads neither if expert parallelism begins or ends: with it experts have an optimizer
of their own, and without it they share that of the other parameters. A new run that begins with a
fully reshardable state (``init.optimizer``) can, because this package then reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer import DistributedOptimizer

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.live.save import ON_DISK, model_states

_KEY, _DP, _FULLY = "distrib_optim_sharding_type", "dp_reshardable", "fully_reshardable"


def content_metadata(optimizer: Any, *, fully_reshardable: bool) -> dict[str, Any]:
    """Return the ``content_metadata`` that megatron-core stores with a checkpoint.

    A fully reshardable state is gathered on the CPU of the first data-parallel rank. By default
    megatron-core would gather it on every GPU, though only that rank writes it.
    """
    return ON_DISK | {
        _KEY: _FULLY if fully_reshardable or not is_distributed(optimizer) else _DP,
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def optimizer_state(
    optimizer: Any, chunks: Sequence[Any], metadata: dict[str, Any], *, is_loading: bool
) -> Any:
    """Return an optimizer's sharded state dict, for saving or loading."""
    models = model_states(chunks)  # made anew each time: saving takes entries out of it
    return optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)


def is_distributed(optimizer: Any) -> bool:
    """Return whether an optimizer's state is sharded over data-parallel ranks."""
    return any(isinstance(part, DistributedOptimizer) for part in parts_of(optimizer))


def parts_of(optimizer: Any) -> list[Any]:
    """Return the optimizers that megatron-core has chained: that of experts is separate."""
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


def is_fully_reshardable(metadata: dict[str, Any]) -> bool:
    """Return whether a checkpoint with this ``content_metadata`` can be loaded at any layout."""
    return metadata.get(_KEY) != _DP


def model_parallel_layout(chunks: Sequence[Any]) -> dict[str, int | None]:
    """Return the settings on which the order in the gradient buffers depends, by config field."""
    layout = {
        "parallel.tp": parallel_state.get_tensor_model_parallel_world_size(),
        "parallel.pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "parallel.vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "parallel.ep": parallel_state.get_expert_model_parallel_world_size(),
        "parameters of a gradient bucket (parallel.overlap)": chunks[0].ddp_config.bucket_size,
    }
    if chunks[0].config.num_moe_experts:
        name = "provider.expert_tensor_parallel_size"
        layout[name] = parallel_state.get_expert_tensor_parallel_world_size()
    return layout


def saved_parts(saved: dict[Any, Any]) -> int:
    """Return the number of optimizers whose state is in ``optimizer`` of a common state."""
    return sum(isinstance(key, int) for key in saved) or 1


def check_parts(folder: Path, saved: dict[Any, Any], optimizer: Any) -> None:
    """Refuse the state of a run with expert parallelism in one without, and the other way round.

    Args:
        folder: folder of the checkpoint.
        saved: ``optimizer`` of its common state; of several optimizers, by number.
        optimizer: optimizer that the state is to be loaded into.

    Raises:
        InputError: the numbers of optimizers differ.
    """
    saved_count = saved_parts(saved)
    count = len(parts_of(optimizer))
    if saved_count == count:
        return
    above, one = "parallel.ep above 1", "parallel.ep=1"
    was, wanted = (above, one) if saved_count > count else (one, above)
    raise InputError(
        f"{folder}: its optimizer state is of a run with {was}, where experts have "
        f"{'an' if saved_count > count else 'no'} optimizer of their own, and can't be loaded with "
        f"{wanted}. Resume with {was}; or begin another run with it, by init.checkpoint and "
        "init.optimizer, if the state was saved fully reshardable."
    )


def check_loadable(
    folder: Path, saved_at: dict[str, int | None] | None, chunks: Sequence[Any]
) -> None:
    """Refuse a ``dp_reshardable`` state that was saved at another model-parallel layout.

    Args:
        folder: folder of the checkpoint.
        saved_at: :func:`model_parallel_layout` of the run that saved it; None if not recorded.
        chunks: chunks of the model that the state is to be loaded into.

    Raises:
        InputError: the layouts differ, or that of the checkpoint is not recorded.
    """
    if saved_at is None:
        raise InputError(
            f"{folder}: its optimizer state depends on the layout that it was saved at "
            f"({_DP}), which {folder.name} does not record. Save it as {_FULLY} where it "
            "was trained, or leave out init.optimizer."
        )
    here = model_parallel_layout(chunks)
    if different := [name for name in here if here[name] != saved_at.get(name)]:
        lines = "\n".join(
            f"  {name}: was {saved_at.get(name)}, is {here[name]}" for name in different
        )
        raise InputError(
            f"{folder}: its optimizer state was saved to be resumed at another data-parallel size, "
            f"not at another model-parallel layout:\n{lines}\n"
            "Resume at the layout that it was saved at. To change the layout, start the command "
            "once more at the saved layout with checkpoint.fully_reshardable=all: it first saves "
            "this step again, for any layout, and can then be stopped with Ctrl-C. The last "
            "checkpoint of a finished run can be resumed at any layout, unless "
            "checkpoint.fully_reshardable=none."
        )
