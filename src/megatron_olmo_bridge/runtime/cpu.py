"""Run megatron-core on gloo on machines without CUDA.

megatron-core assumes a CUDA device. :func:`cpu_runtime` redirects the few calls that
would need one, so that its real code (parallel layers, pipeline schedules, distributed optimizer,
``dist_checkpointing``) runs on the CPU. All changes are in :data:`PATCHES` and the two context
managers below it, and are undone on exit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_ABSENT = object()
_PROCESS_LIFETIME = contextlib.ExitStack()
_entered = 0
"""Number of nested :func:`cpu_runtime` contexts that the process is in."""


@dataclass(frozen=True)
class Patch:
    """Attribute that is replaced within :func:`cpu_runtime`."""

    owner: str
    """Module or class, as ``package.module`` or ``package.module:Class``."""
    name: str
    value: Any
    reason: str
    """Code in megatron-core that needs the patch."""

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set the replacement; restore the original on exit."""
        owner = pkgutil.resolve_name(self.owner)
        # Look at the owner's own attributes: one that is inherited is restored by removing ours.
        before = vars(owner).get(self.name, _ABSENT)
        setattr(owner, self.name, self.value)
        try:
            yield
        finally:
            if before is _ABSENT:
                delattr(owner, self.name)
            else:
                setattr(owner, self.name, before)


def _type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return ``Tensor.type``; without arguments, the name the tensor would have on a GPU."""
    found = torch._C.TensorBase.type(self, *args, **kwargs)
    # A torch function mode looks Tensor.type up again, and so calls this twice.
    if isinstance(found, str) and not found.startswith("torch.cuda."):
        return found.replace("torch.", "torch.cuda.", 1)
    return found


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


_RANDOM = "megatron.core.tensor_parallel.random"

# The CPU's generator stands in for the GPU's. megatron-core's own tracker then forks and restores
# real, seeded states, so that initial weights and dropout are reproducible.
PATCHES: tuple[Patch, ...] = (
    Patch("torch.cuda", "current_device", lambda: _CPU,
          "layers, gradient buffers and schedules allocate on torch.cuda.current_device()"),
    Patch("torch.cuda", "synchronize", lambda *args, **kwargs: None,
          "the checkpoint writer and the pipeline's send/receive call it unguarded"),
    Patch("torch.cuda", "current_stream", lambda *args, **kwargs: None,
          "0.19's gradient reduction asks for it, to wait for CUDA graphs; here there are none"),
    Patch("torch:Tensor", "cuda", lambda self, *args, **kwargs: self,
          "tied embeddings over several stages, and fully parallel loading, move tensors by it"),
    Patch("torch:Tensor", "type", _type_name,
          "optimizers and gradient clipping compare Tensor.type() with 'torch.cuda.FloatTensor'"),
    Patch("torch.cuda", "manual_seed", torch.manual_seed,
          "model_parallel_cuda_manual_seed seeds the default and the tracked states by it"),
    Patch("torch.cuda", "get_rng_state", _get_rng_state,
          "CudaRNGStatesTracker.add reads the state that a seed gives"),
    Patch("torch.cuda.random", "get_rng_state", _get_rng_state,
          "CudaRNGStatesTracker.fork and activation checkpointing read the state by this name"),
    Patch(_RANDOM, "_set_cuda_rng_state", _set_rng_state,
          "the tracker restores states by it, into CUDA's generators"),
    Patch(_RANDOM, "_CUDA_RNG_STATE_TRACKER", None,
          "the tracker is global: begin with none, and leave no CPU states behind for CUDA"),
    Patch(_RANDOM, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False,
          "goes with the tracker"),
)  # fmt: skip


class _CudaToCpu(TorchFunctionMode):
    """Redirect ``device="cuda"`` to the CPU.

    Reason: gradient clipping, pipeline schedules and causal masks create tensors with a literal
    ``device="cuda"``, which no attribute can redirect.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs and str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_fork_warning() -> Iterator[None]:
    """Silence "CPU RNG state changed": within a fork it changes, being the tracked state here."""
    logger = logging.getLogger(_RANDOM)

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("CPU RNG state changed")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """Run stock megatron-core on the CPU within this context; process groups must be gloo.

    Raises:
        RuntimeError: CUDA is available.
    """
    if torch.cuda.is_available():
        raise RuntimeError("cpu_runtime() is for machines without CUDA; here CUDA is available")
    global _entered
    with contextlib.ExitStack() as stack:
        for patch in PATCHES:
            stack.enter_context(patch.applied())
        stack.enter_context(_no_fork_warning())
        stack.enter_context(_CudaToCpu())
        _entered += 1
        try:
            yield
        finally:
            _entered -= 1


def ensure_cpu_runtime() -> None:
    """Without CUDA, enter :func:`cpu_runtime` for the rest of the process, and log it.

    Do nothing with CUDA, or if the process is in it already.
    """
    if not torch.cuda.is_available() and not _entered:
        _PROCESS_LIFETIME.enter_context(cpu_runtime())
        if os.environ.get("RANK", "0") == "0":
            log = logging.getLogger(__name__)
            log.warning("no CUDA here: megatron-core runs on the CPU, on gloo")
