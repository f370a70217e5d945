"""Process groups for a parallel layout: one process, those of torchrun, or those of Slurm's srun.

Nothing here has to be called before a model is built: :func:`ensure_process_groups` sets up what is
missing and leaves alone what the user's own code, Megatron-LM's for example, has set up.
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
"""For dropout and for initial weights, where none is asked for; Megatron-LM's default."""
TIMEOUT_MINUTES = 60
"""How long a process waits for others by default: longer than the first one works on files."""
_FIRST_PORT, _PORTS = 15000, 15000
"""Ports for the rendezvous of a Slurm job: below those that Linux gives out by itself."""


_waiting: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
"""The default group, and the group on gloo that waits in its place."""
_timeout = timedelta(minutes=TIMEOUT_MINUTES)
"""Of the groups that are made here."""


def ensure_process_groups(
    layout: ModelParallelConfig, seed: int = SEED, *, timeout_minutes: int = TIMEOUT_MINUTES
) -> None:
    """Set up torch.distributed and megatron-core's groups for a layout, where they aren't yet.

    Without CUDA the CPU runtime is entered and the groups are gloo's; with it they are NCCL's.

    Args:
        layout: a provider, or any other config with the parallel sizes.
        seed: of megatron-core's random numbers.
        timeout_minutes: how long a process waits for others before it gives up.

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
    """Undo :func:`ensure_process_groups`; also after a part of it."""
    global _waiting
    _waiting = None
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        tensor_parallel.get_cuda_rng_tracker().reset()
        # What refers to a group keeps its threads, which in gloo poll a hundred times a second; and
        # a model that trained with its optimizer refers to itself.
        gc.collect()


def started_together() -> int:
    """Processes of this run: those of the groups, or before these exist what torchrun or srun says;
    else 1."""
    if dist.is_initialized():
        return dist.get_world_size()
    says = "WORLD_SIZE" if "RANK" in os.environ else "SLURM_STEP_NUM_TASKS"
    return int(os.environ.get(says, "1"))


def on_first(action: Callable[[], T]) -> T | None:
    """Do something in the first process, and return its result there; the others wait for it, on
    the CPU.

    Raises:
        Exception: what the action raised, in all processes.
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
    """Return what each process passes, by rank, in all of them; they wait on the CPU."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, _waiting_group())
    return values


def wait_for_all() -> None:
    """Wait until all processes are here, on the CPU."""
    dist.barrier(_waiting_group())


def _waiting_group() -> dist.ProcessGroup:
    """A group of all processes on gloo: waiting in NCCL would keep the GPU busy."""
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
        # Threads of gloo's that are left at the end of the process abort it now and then.
        atexit.register(destroy_process_groups)


def add_slurm(env: MutableMapping[str, str]) -> None:
    """Say in torchrun's variables what srun says in its own; of one task there is nothing to say.

    The first host of the step is the meeting place, at a port that follows from the job's number.

    Raises:
        InputError: srun's variables are not all there.
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
    """``gpu003`` of Slurm's ``gpu[003-005,7],login``.

    Raises:
        InputError: it isn't a list of hosts.
    """
    match = re.match(r"[^\[\],](?:[^\[\],]|\[\w[\w,-]*\])*(?=,|$)", nodelist)
    if match is None:
        raise InputError(f"{nodelist!r} is not a list of Slurm nodes")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def torchrun_command(processes: int) -> str:
    """The command that starts the running script with so many processes."""
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
