"""Process groups for a parallel layout, in a single process or under torchrun or Slurm's srun.

Nothing here has to be called before a model is built: :func:`ensure_process_groups` creates what is
missing and keeps what the user's own code, for example Megatron-LM's, has set up.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

from megatron_olmo_bridge.errors import InputError

from .cpu import ensure_cpu_runtime
from .devices import gpu_of

T = TypeVar("T")

SEED = 1234
"""Default seed of dropout and initial weights; the same as Megatron-LM's."""
TIMEOUT_MINUTES = 60
"""Default timeout of a process waiting for others: longer than the first one's file work."""
_FIRST_PORT, _PORTS = 15000, 15000
"""Ports for the rendezvous of a Slurm job, below Linux's ephemeral ports."""


_waiting: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
"""Default group, and the gloo group that waits in its place."""
_timeout = timedelta(minutes=TIMEOUT_MINUTES)
"""Timeout of the groups created here."""


def ensure_process_groups(
    layout: ModelParallelConfig, seed: int = SEED, *, timeout_minutes: int = TIMEOUT_MINUTES
) -> None:
    """Create torch.distributed's and megatron-core's groups for a layout unless they exist.

    With CUDA the groups use NCCL; without it they use gloo, within the CPU runtime.

    Args:
        layout: a provider, or any other config with the parallel sizes.
        seed: seed of megatron-core's random numbers.
        timeout_minutes: time after which a process stops waiting for others.

    Raises:
        InputError: the processes are not a multiple of those that the layout takes, there are more
            of them on this machine than GPUs, or the groups exist already for another layout. The
            message has the command to use.
    """
    global _timeout
    _timeout = timedelta(minutes=timeout_minutes)
    begun = dist.is_initialized()
    if not begun and "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        add_slurm(os.environ)
    ensure_cpu_runtime()
    if not begun:
        _init_distributed(_timeout)
    tensor = layout.tensor_model_parallel_size
    pipeline = layout.pipeline_model_parallel_size
    virtual = layout.virtual_pipeline_model_parallel_size
    expert = layout.expert_model_parallel_size
    expert_tensor = layout.expert_tensor_parallel_size or tensor
    _check_world_size(tensor, pipeline, expert, expert_tensor)
    if parallel_state.model_parallel_is_initialized():
        _check_same_layout(tensor, pipeline, virtual, expert)
    else:
        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            distributed_timeout_minutes=timeout_minutes,
        )
    if not tensor_parallel.get_cuda_rng_tracker().is_initialized():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy_process_groups() -> None:
    """Undo :func:`ensure_process_groups`, even if it failed midway."""
    global _waiting
    _waiting = None
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        tensor_parallel.get_cuda_rng_tracker().reset()
        # A group's threads live as long as a reference to it, and gloo's poll 100 times a second.
        # A model and its optimizer refer to each other, so only the collector frees them.
        gc.collect()


def started_together() -> int:
    """Return the number of processes of this run: the groups' world size or, before they exist,
    torchrun's or srun's; else 1."""
    if dist.is_initialized():
        return dist.get_world_size()
    variable = "WORLD_SIZE" if "RANK" in os.environ else "SLURM_STEP_NUM_TASKS"
    return int(os.environ.get(variable, "1"))


def on_first(action: Callable[[], T]) -> T | None:
    """Run an action on rank 0 and return its result there; the other ranks wait on the CPU.

    Raises:
        Exception: the action's exception, in all processes.
    """
    result: T | None = None
    errors: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            result = action()
        except Exception as error:
            errors = [error]
    dist.broadcast_object_list(errors, 0, _waiting_group())
    if errors[0] is not None:
        raise errors[0]
    return result


def gather(value: T) -> list[T]:
    """Gather one value from each process, by rank, in all processes; they wait on the CPU."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, _waiting_group())
    return values


def wait_for_all() -> None:
    """Wait on the CPU until all processes reach this call."""
    dist.barrier(_waiting_group())


def _waiting_group() -> dist.ProcessGroup:
    """Return a gloo group of all processes: waiting in NCCL would keep the GPU busy."""
    global _waiting
    world = dist.group.WORLD
    assert world is not None
    if dist.get_backend() == "gloo":
        return world
    if _waiting is None or _waiting[0] is not world:
        _waiting = world, dist.new_group(backend="gloo", timeout=_timeout)
    return _waiting[1]


def _init_distributed(timeout: timedelta) -> None:
    index = gpu_of(torch.cuda.device_count(), os.environ)
    device = None if index is None else torch.device("cuda", index)
    backend = "gloo"
    if device is not None:
        torch.cuda.set_device(device)
        backend = "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=0, world_size=1, device_id=device
        )
    if device is None:
        # Gloo threads that still run when the process ends sometimes abort it.
        atexit.register(destroy_process_groups)


def add_slurm(env: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from srun's; do nothing for a single task.

    The rendezvous is at the first host of the step, at a port derived from the job id.

    Raises:
        InputError: a variable of srun is missing.
    """
    try:
        if env["SLURM_STEP_NUM_TASKS"] == "1":
            return
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(_FIRST_PORT + int(env["SLURM_JOB_ID"]) % _PORTS))
    except KeyError as error:
        raise InputError(
            f"this looks like a task of srun, but {error.args[0]} is not set; start it by srun or "
            "by torchrun"
        ) from error


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: ``gpu003`` for ``gpu[003-005,7],login``.

    Raises:
        InputError: the text is not a list of hosts.
    """
    match = re.match(r"[^\[\],](?:[^\[\],]|\[\w[\w,-]*\])*(?=,|$)", nodelist)
    if match is None:
        raise InputError(f"{nodelist!r} is not a list of Slurm nodes")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def torchrun_command(processes: int) -> str:
    """Return the command that starts the running script with ``processes`` processes."""
    script = sys.argv[0] if sys.argv and sys.argv[0].endswith(".py") else None
    command = [script, *sys.argv[1:]] if script else ["YOUR_SCRIPT.py"]
    return f"torchrun --nproc_per_node {processes} {shlex.join(command)}"


def _check_world_size(tensor: int, pipeline: int, expert: int, expert_tensor: int) -> None:
    needed = math.lcm(tensor, expert_tensor * expert) * pipeline
    present = dist.get_world_size()
    if present % needed:
        experts = f" x expert_model_parallel_size {expert}" if expert > 1 else ""
        raise InputError(
            f"tensor_model_parallel_size {tensor} x pipeline_model_parallel_size {pipeline}"
            f"{experts} takes "
            f"{needed} processes or a multiple of it, here {'is' if present == 1 else 'are'} "
            f"{present}. Start it as:\n  {torchrun_command(needed)}"
        )


def _check_same_layout(tensor: int, pipeline: int, virtual: int | None, expert: int) -> None:
    wanted = (tensor, pipeline, virtual, expert)
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    if wanted != found:
        raise InputError(
            "this process has groups for tensor, pipeline, virtual pipeline and expert sizes "
            f"{found}, the model asks for {wanted}. Call destroy_process_groups() before another "
            "layout."
        )
