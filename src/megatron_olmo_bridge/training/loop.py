"""The training loop: forward-backward, optimizer step, repeat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from .monitor.run_log import StepRecord
from .task import Sums
from .token_data import Batch

if TYPE_CHECKING:
    from .run import Run


def train_loop(run: Run) -> None:
    """Train from the step that the run is at to its last.

    Raises:
        TrainingStopped: the loss is not a number, or spiked; or the run was asked to stop.
    """
    batches = run.task.train_batches(begin=run.step + 1)
    if run.step == 0:
        run.evaluate()
    elif run.saved_for_one_layout_only():
        run.save()
    while not run.finished:
        record, asked_to_stop = one_step(run, batches)
        run.after_step(record, asked_to_stop)


def one_step(run: Run, batches: Iterator[Batch]) -> tuple[StepRecord, bool]:
    """Learn from the next global batch.

    Returns:
        What there is to say of the step, and whether any process was asked to stop.

    Raises:
        TrainingStopped: the loss is not a number, or spiked.
    """
    began = time.perf_counter()
    run.clear_gradients()
    sums = forward_backward(run, batches, run.micro_batches)
    loss, z_loss, asked_to_stop = shared_means(sums, run.asked_to_stop)
    run.step += 1
    run.watch.check(run.step, loss)
    run.scheduler.step(1)
    grad_norm, skipped = optimizer_step(run, loss)
    run.watch.remember(run.step, loss, grad_norm, skipped)
    record = StepRecord(
        step=run.step,
        tokens=run.step * run.config.tokens_per_step,
        loss=loss,
        z_loss=z_loss,
        lr=run.learning_rate,
        grad_norm=grad_norm,
        seconds=time.perf_counter() - began,
        skipped=skipped,
    )
    return record, asked_to_stop


def forward_backward(
    run: Run, batches: Iterator[Batch], count: int, *, learn: bool = True
) -> list[Sums]:
    """Run ``count`` micro-batches forward, and to learn also backward, on megatron-core's schedule.

    Returns:
        What each micro-batch's score gave; on the last pipeline stage, elsewhere nothing.
    """
    chunks, train = run.chunks, run.config.train
    mine = [next(batches) for _ in range(count)]
    iterators = [iter(mine) for _ in chunks]  # each chunk of a stage runs all of them
    run_schedule = get_forward_backward_func()
    return run_schedule(  # type: ignore[no-any-return]
        forward_step_func=lambda iterator, chunk: run.task.forward(chunk, next(iterator)),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=count,
        seq_length=train.sequence_length,
        micro_batch_size=train.micro_batch_size,
        forward_only=not learn,
    )


def optimizer_step(run: Run, loss: float) -> tuple[float, bool]:
    """Take an optimizer step, unless this one is to be skipped.

    Returns:
        The gradient's norm before clipping, and whether the step was skipped.
    """
    if run.watch.may_skip:
        run.optimizer.prepare_grads()
        norm = float(run.optimizer.get_grad_norm())
        if run.watch.is_spike(loss, norm):
            return norm, True
    _, norm, _ = run.optimizer.step()
    return float(norm or 0.0), False


def shared_means(sums: list[Sums], asked_to_stop: bool) -> tuple[float, float, bool]:
    """Mean loss and z-loss of the global batch, and whether any process was asked to stop; the
    same in all processes."""
    mine = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    # Tensor-parallel ranks of the last stage all have the same: one of them speaks.
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for each in sums:
            for i, name in enumerate(("loss", "z_loss", "weight")):
                mine[i] += each.get(name, 0.0)
    mine[3] = float(asked_to_stop)
    dist.all_reduce(mine)
    loss, z_loss, weight, stops = mine.tolist()
    return loss / weight, z_loss / weight, stops > 0


def total(sums: list[Sums]) -> Sums:
    """Sums over micro-batches and data-parallel ranks, in all processes, on the CPU."""
    found: list[Sums | None] = [None]
    if sums:
        added = {
            name: torch.stack([each[name].double() for each in sums]).sum(0) for name in sums[0]
        }
        for value in added.values():
            dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        found = [{name: value.cpu() for name, value in added.items()}]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(found, last, group)
    assert found[0] is not None
    return found[0]
