"""Formats of the optimizer state in a checkpoint, and the layouts at which each can be loaded.

megatron-core's distributed optimizer has two formats (``DistributedOptimizer.sharded_state_dict``):

- ``dp_reshardable``: each rank writes its own part of the gradient buffers, as they are. Nothing is
  gathered, but a buffer's order depends on the model-parallel layout: only the data-parallel size
  may change.
- ``fully_reshardable``: the buffers are gathered and cut into parameters, which can be loaded at
  any layout. That takes the whole state of a tensor and pipeline shard in one place.

An optimizer that is not distributed has parameters, and is fully reshardable as it is. One limit is
left: with expert parallelism experts have an optimizer of their own, without it they have not.
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

    What is fully reshardable is gathered on the CPU of the first data-parallel rank. By default
    megatron-core would gather it on every GPU, for ranks that then write nothing of it.
    """
    return ON_DISK | {
        _KEY: _FULLY if fully_reshardable or not is_distributed(optimizer) else _DP,
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def optimizer_state(
    optimizer: Any, chunks: Sequence[Any], metadata: dict[str, Any], *, is_loading: bool
) -> Any:
    """Return an optimizer's sharded state dict, for saving or loading."""
    models = model_states(chunks)  # a new copy, because saving consumes it
    return optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)


def is_distributed(optimizer: Any) -> bool:
    """Return whether the state is sharded over data-parallel ranks."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(isinstance(part, DistributedOptimizer) for part in parts)


def is_fully_reshardable(metadata: dict[str, Any]) -> bool:
    """Return whether a checkpoint with this ``content_metadata`` can be loaded at any layout."""
    return metadata.get(_KEY) != _DP


def model_parallel_layout(chunks: Sequence[Any]) -> dict[str, int | None]:
    """Return what the order of the gradient buffers depends on, by config field."""
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


def check_parts(folder: Path, saved: dict[Any, Any], optimizer: Any) -> None:
    """Refuse the state of a run with expert parallelism in one without, and the other way round.

    Args:
        folder: the checkpoint's.
        saved: ``optimizer`` of its common state; that of several optimizers is kept by number.
        optimizer: that it is to be loaded into.

    Raises:
        InputError: the numbers of optimizers differ.
    """
    before = sum(isinstance(key, int) for key in saved) or 1
    here = len(getattr(optimizer, "chained_optimizers", [optimizer]))
    if before == here:
        return
    above, one = "parallel.ep above 1", "parallel.ep=1"
    was, this = (above, one) if before > here else (one, above)
    raise InputError(
        f"{folder}: its optimizer state is of a run with {was}, where experts have "
        f"{'an' if before > here else 'no'} optimizer of their own, and can't be loaded with "
        f"{this}. Resume with {was}; or begin another run with the weights alone, by "
        "init.checkpoint without init.optimizer."
    )


def check_loadable(
    folder: Path, saved_at: dict[str, int | None] | None, chunks: Sequence[Any]
) -> None:
    """Refuse a ``dp_reshardable`` state that was saved at another model-parallel layout.

    Args:
        folder: the checkpoint's.
        saved_at: :func:`model_parallel_layout` when it was saved; None where that isn't recorded.
        chunks: the model that it is to be loaded into.

    Raises:
        InputError: the layouts differ, or the checkpoint's is not known.
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
            "checkpoint of a finished run is for any layout, unless it was told otherwise."
        )
