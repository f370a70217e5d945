"""Do with live models what users do, and save the results. Contains no tests.

    live_model.py '[{"action": "logits", "out": "FOLDER", "hf": "FOLDER", "fields": {...}}, ...]'

Start it with torchrun, or directly for one process. The same processes run the steps one after the
other. A step's ``fields`` are set on the provider: they are its parallel layout. Every model is
poisoned with NaN before its weights are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

# These tests run on the CPU even if there is a GPU: they take up to four processes.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
from live_layouts import (
    BETAS,
    CLIP,
    DECAY,
    EPSILON,
    LEARNING_RATE,
    STEPS,
    Step,
    digest,
    labels_of,
    random_tokens,
    relative_error,
    sizes,
    training_tokens,
)
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import unwrap_model

from megatron_olmo_bridge import AutoBridge, hf_as_megatron
from megatron_olmo_bridge.inference.forward import forward
from megatron_olmo_bridge.live.load import load_weights
from megatron_olmo_bridge.models.provider import GPTModelProvider
from megatron_olmo_bridge.nn import qk_norm
from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups
from megatron_olmo_bridge.training.optimizer import olmo_weight_decay

Chunks = list[Any]


# ---------------------------------------------------------------------------------------- models


def set_fields(provider: GPTModelProvider, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        assert hasattr(provider, name), name
        setattr(provider, name, value)


def build(
    step: Step, ddp: DistributedDataParallelConfig | None = None
) -> tuple[AutoBridge, GPTModelProvider, Chunks]:
    """Build this rank's poisoned chunks at the step's layout, wrapped if ``ddp`` is given."""
    enter_layout(step["fields"])
    bridge = AutoBridge.from_hf_pretrained(step["hf"])
    provider = bridge.to_megatron_provider(load_weights=False)
    set_fields(provider, step["fields"])
    chunks = provider.provide_distributed_model(ddp, wrap_with_ddp=ddp is not None)
    poison(chunks)
    return bridge, provider, chunks


_sizes: tuple[int, ...] = ()
"""Parallel sizes of the current process groups."""


def enter_layout(fields: dict[str, Any]) -> None:
    """Destroy the process groups of the previous step unless this layout can share them."""
    global _sizes
    if sizes(fields) != _sizes:
        leave_layout()
        _sizes = sizes(fields)


def leave_layout() -> None:
    """Destroy the process groups of the previous step; the processes stay connected.

    Each group has three gloo threads that poll a hundred times a second.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        gc.collect()  # models and optimizers refer to groups, and to themselves


def poison(chunks: Chunks) -> None:
    """Fill every parameter with NaN, so that a parameter that isn't loaded shows in all results."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


@contextlib.contextmanager
def built_poisoned() -> Iterator[None]:
    """Poison the models built in this context, for calls that both build and load a model."""
    provide = GPTModelProvider.provide

    def provide_poisoned(self: GPTModelProvider, *args: Any, **kwargs: Any) -> Any:
        model = provide(self, *args, **kwargs)
        poison([model])
        return model

    with patch.object(GPTModelProvider, "provide", provide_poisoned):
        yield


def everyone(mine: Any) -> list[Any]:
    """Return every rank's object in rank order."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def save(step: Step, name: str, value: Any) -> None:
    """Write a result from rank 0, as JSON or with torch.save."""
    if dist.get_rank() == 0:
        file = Path(step["out"]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            file.write_text(json.dumps(value))
        else:
            torch.save(value, file)
    dist.barrier()


def digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Return name and digest of each tensor in stream order."""
    return [[name, digest(tensor)] for name, tensor in tensors]


# --------------------------------------------------------------------------------------- running


def logits(step: Step) -> None:
    """Save the logits of a batch from every process of the last stage."""
    bridge, _, chunks = build(step)
    poisoned = all(bool(p.isnan().all()) for chunk in chunks for p in chunk.parameters())
    save(step, "poisoned.json", everyone(poisoned))
    bridge.load_hf_weights(chunks)
    tokens = random_tokens(*step["batch"])
    mine = forward(chunks, tokens, vocab_size=bridge.model_bridge.vocab_size)
    save(step, "logits.pt", [found for found in everyone(mine) if found is not None])


def forward_backward(provider: GPTModelProvider, chunks: Chunks, tokens: torch.Tensor) -> float:
    """Run Megatron's own schedule in microbatches of two rows; return the batch's mean loss.

    The rows are divided among the data-parallel ranks.
    """
    share = parallel_state.get_data_parallel_rank()
    batches = tokens.chunk(parallel_state.get_data_parallel_world_size())[share].split(2)

    def step(iterator: Any, chunk: Any) -> Any:
        batch = next(iterator)
        positions = torch.arange(batch.shape[1]).expand_as(batch)
        output = chunk(batch, positions, None, labels=labels_of(batch))
        return output, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    provider.finalize_model_grads_func = finalize_model_grads
    for chunk in chunks:
        chunk.zero_grad_buffer()
    iterators = [iter(batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=tokens.shape[1],
        micro_batch_size=2,
        forward_only=False,
    )
    # Only the last stage has losses, the same number on each of its ranks.
    losses = [loss for rank in everyone([float(o["loss"]) for o in outputs]) for loss in rank]
    return sum(losses) / len(losses)


def gradients(step: Step) -> None:
    """Save loss and finalized gradients of a batch, by Hugging Face names."""
    with MUTANTS[step.get("mutant", "none")]():
        bridge, provider, chunks = build(step, DistributedDataParallelConfig())
        bridge.load_hf_weights(chunks)
        loss = forward_backward(provider, chunks, random_tokens(*step["batch"]))
        copies = disagreement(chunks)
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.copy_(parameter.main_grad)
        found = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks)}
    save(step, "gradients.pt", {"loss": loss, "gradients": found, "copies": copies})


def disagreement(chunks: Chunks) -> dict[str, float]:
    """Return the largest difference between the copies of a gradient on tensor-parallel ranks.

    Only one of the copies is exported, but each rank updates its own copy of the weight.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for i, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if parameter.tensor_model_parallel:
                continue
            mine = parameter.main_grad
            copies = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(copies, mine, group=group)
            for rank, copy in enumerate(copies):
                label = f"rank {dist.get_rank()}, chunk {i}, {name}, copy {rank}"
                found[label] = relative_error(copy, mine)
    return {label: error for rank in everyone(found) for label, error in rank.items()}


# --------------------------------------------------------------------------- wrong QK norms


class RankLocal:
    """Wrong sum over ranks: extrapolated from this rank's heads alone."""

    @staticmethod
    def apply(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return x * group.size()


class NotDifferentiable:
    """Wrong sum over ranks: its backward pass ignores that other ranks use the sum."""

    @staticmethod
    def apply(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total


@contextlib.contextmanager
def sharded_weight() -> Iterator[None]:
    """Shard the QK norm's weight by heads, also in the checkpoint.

    Forward and backward are right, but megatron-core sums the shards as if they were copies.
    """
    norm = qk_norm.FullWidthRMSNorm
    init = norm.__init__

    def init_sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.weight = torch.nn.Parameter(self.weight.data.chunk(self.group.size())[0].clone())

    def forward_sharded(self: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = wide.pow(2).sum((-2, -1), keepdim=True)
        squares = qk_norm._SumOverRanks.apply(squares, self.group)
        mean_square = squares / (self.num_heads * self.head_dim)
        weight = self.weight.view(-1, self.head_dim)
        return qk_norm.scale_by_rms(wide, mean_square, weight, self.eps).to(x.dtype)

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)

    with (
        patch.object(norm, "__init__", init_sharded),
        patch.object(norm, "forward", forward_sharded),
        patch.object(norm, "sharded_state_dict", sharded_state_dict, create=True),
    ):
        yield


MUTANTS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "rank-local variance": lambda: patch.object(qk_norm, "_SumOverRanks", RankLocal),
    "plain all_reduce": lambda: patch.object(qk_norm, "_SumOverRanks", NotDifferentiable),
    "sharded weight": sharded_weight,
}


# --------------------------------------------------------------------------------------- weights


def roundtrip(step: Step) -> None:
    """Load a live model and export it in every form; save also the bytes that each rank read."""
    bridge, _, chunks = build(step)
    assert bridge.source is not None
    read = load_weights(chunks, bridge.source)
    save(step, "bytes_read.json", everyone(read))
    save(step, "exported.json", digests(bridge.export_hf_weights(chunks)))
    bridge.save_hf_pretrained(chunks, Path(step["out"]) / "hf", max_shard_size="1MB")
    bridge.save_megatron_model(chunks, Path(step["out"]) / "megatron", iteration=3)


def reload(step: Step) -> None:
    """Load a Megatron checkpoint into the step's layout, with the bridge and with stock code."""
    bridge, _, chunks = build(step)
    folder = Path(step["megatron"])
    state = {model_name(chunks, i): c.sharded_state_dict() for i, c in enumerate(chunks)}
    loaded = dist_checkpointing.load(state, str(folder / "iter_0000003"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[model_name(chunks, i)])
    save(step, "by_megatron.json", digests(bridge.export_hf_weights(chunks)))

    leave_layout()
    with built_poisoned():
        chunks = bridge.load_megatron_model(folder, **step["fields"])
    save(step, "by_bridge.json", digests(bridge.export_hf_weights(chunks)))


def model_name(chunks: Chunks, i: int) -> str:
    return "model" if len(chunks) == 1 else f"model{i}"


def stock_load(step: Step) -> None:
    """Load a Hugging Face folder with stock dist_checkpointing.load in its strictest mode."""
    for strict in (StrictHandling.ASSUME_OK_UNEXPECTED, StrictHandling.RAISE_UNEXPECTED):
        bridge, _, chunks = build(step)
        state = {model_name(chunks, i): c.sharded_state_dict() for i, c in enumerate(chunks)}
        with hf_as_megatron(step["hf"]) as (folder, strategy):
            loaded = dist_checkpointing.load(
                state, folder, sharded_strategy=strategy, strict=strict
            )
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[model_name(chunks, i)])
        save(step, f"{strict.value}.json", digests(bridge.export_hf_weights(chunks)))


def export(step: Step) -> None:
    """Save the stream of weights as each rank sees it, for all ranks and for rank 0 only."""
    bridge, _, chunks = build(step)
    bridge.load_hf_weights(chunks)
    for name, options in (("all", {}), ("rank 0", {"rank": 0}), ("cpu", {"cpu": True})):
        seen = [
            [tensor_name, digest(tensor), tensor.device.type]
            for tensor_name, tensor in bridge.export_hf_weights(chunks, **options)
        ]
        save(step, f"{name}.json", everyone(seen))


def export_memory(step: Step) -> None:
    """Save the peak growth of each rank's memory, in bytes, while it consumes the stream."""
    # glibc returns heap blocks to the system late or never. Larger blocks are separate mappings,
    # which come and go with the tensors. Fix the threshold at 1 MiB: glibc would raise it.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    bridge, _, chunks = build(step)
    bridge.load_hf_weights(chunks)
    largest = 0
    dist.barrier()
    with PeakMemory() as memory:
        for _name, tensor in bridge.export_hf_weights(chunks):
            largest = max(largest, tensor.nbytes)  # stays alive until the next one
        dist.barrier()
    save(step, "memory.json", {"grown": everyone(memory.grown), "largest": largest})


M_MMAP_THRESHOLD = -3
"""Value from malloc.h."""


class PeakMemory:
    """Peak of this process's anonymous memory (allocated, not mapped), polled by a thread."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = anonymous_memory()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.is_set():
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.0005)

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self.grown = self.peak - self.before


def anonymous_memory() -> int:
    """Return this process's anonymous memory in bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


# -------------------------------------------------------------------------------------- training


def make_optimizer(
    chunks: Chunks, distributed: bool = False
) -> tuple[Any, OptimizerParamScheduler]:
    """Make OLMo's AdamW with a constant learning rate."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=LEARNING_RATE,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPSILON,
        clip_grad=CLIP,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=olmo_weight_decay())
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=LEARNING_RATE,
        max_lr=LEARNING_RATE,
        min_lr=LEARNING_RATE,
        lr_warmup_steps=0,
        lr_decay_steps=STEPS,
        lr_decay_style="constant",
        start_wd=DECAY,
        end_wd=DECAY,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def train(step: Step) -> None:
    """Train five steps; save the losses, the gradient norms, and the final weights."""
    distributed = step["distributed_optimizer"]
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    bridge, provider, chunks = build(step, ddp)
    bridge.load_hf_weights(chunks)
    optimizer, scheduler = make_optimizer(chunks, distributed)
    losses, norms = [], []
    for tokens in training_tokens():
        optimizer.zero_grad()
        losses.append(forward_backward(provider, chunks, tokens))
        _, norm, _ = optimizer.step()
        scheduler.step(increment=1)
        norms.append(float(norm))
    weights = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks)}
    save(step, "run.pt", {"losses": losses, "norms": norms, "weights": weights})


def decays(step: Step) -> None:
    """Save the weight decay of every parameter on each rank, by megatron-core's names."""
    _, _, chunks = build(step, DistributedDataParallelConfig())
    optimizer, _ = make_optimizer(chunks)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    (chunk,) = unwrap_model(chunks)
    listed = {name: decay[id(parameter)] for name, parameter in chunk.named_parameters()}
    save(step, "decays.json", everyone(listed))


ACTIONS = (logits, gradients, roundtrip, reload, stock_load, export, export_memory, train, decays)


def main() -> None:
    actions = {action.__name__: action for action in ACTIONS}
    for step in json.loads(sys.argv[1]):
        began = time.perf_counter()
        actions[step["action"]](step)
        if dist.get_rank() == 0:
            print(f"{step['action']} {step['out']}: {time.perf_counter() - began:.1f} s")
    dist.barrier()  # a process that exits early would close the others' connections
    destroy_process_groups()


if __name__ == "__main__":
    main()
