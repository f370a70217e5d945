"""The training loop, top down: the loop, one step, and what follows a step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_olmo_bridge.convert.options import ExportOptions
from megatron_olmo_bridge.convert.to_hf import export_checkpoint
from megatron_olmo_bridge.errors import AskedToStop, BridgeError, TrainingStopped
from megatron_olmo_bridge.live.save import save_hf
from megatron_olmo_bridge.runtime.process_groups import on_first
from megatron_olmo_bridge.storage.execute import WriteOptions

from .card import write_card
from .checkpoint import Checkpointer, iteration_folder
from .config import FIRST_STEP
from .monitor.records import StepRecord
from .monitor.run_log import RunLog
from .optimizer import reset_step
from .resolve import ResolvedRun
from .stability import Watch
from .task import Sums, Task
from .token_data import Batch


@dataclass
class Run:
    """State of a run, for :func:`train_loop`."""

    resolved: ResolvedRun
    task: Task
    chunks: list[Any]
    """This rank's part of the model, as ``provide_distributed_model`` returns it."""
    optimizer: Any
    scheduler: Any
    watch: Watch
    checkpointer: Checkpointer | None
    log: RunLog
    step: int = 0
    """Optimizer steps taken so far."""
    asked_to_stop: bool = False
    """True once this process has received a signal to stop."""
    stopped_early: bool = False
    """True once the task has stopped the run early."""
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics of the last step and the last evaluation."""

    @property
    def finished(self) -> bool:
        return self.stopped_early or self.step >= self.resolved.config.train.steps


def train_loop(run: Run) -> None:
    """Train from the run's current step to its last, and complete its checkpoints and log.

    Raises:
        TrainingStopped: the loss is not a number, or spiked; or the run was asked to stop.
    """
    with _stopping_on_signals(run), _logging_the_end(run):
        batches = run.task.train_batches(begin=run.step + 1)
        if run.step == (run.resolved.config.init.step or 0):
            evaluate(run)  # the curve starts with the initial model
        elif _must_be_saved_again(run):
            save(run)
        while not run.finished:
            record, asked_to_stop = one_step(run, batches)
            after_step(run, record, asked_to_stop)


# -------------------------------------------------------------------------------------- one step


def one_step(run: Run, batches: Iterator[Batch]) -> tuple[StepRecord, bool]:
    """Train on the next global batch.

    Returns:
        The record of the step, and whether any process was asked to stop.

    Raises:
        TrainingStopped: the loss is not a number, or spiked.
    """
    began = time.perf_counter()
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()

    # Gradients accumulate over the micro-batches; data-parallel ranks sum them once, at the last.
    sums = forward_backward(run, batches, run.resolved.layout.micro_batches)
    loss, z_loss, asked_to_stop = global_means(sums, run.asked_to_stop)

    run.step += 1
    run.watch.check(run.step, loss)  # before a bad loss can change the weights
    run.scheduler.step(1)  # before the optimizer: step n has the n-th learning rate of the schedule
    grad_norm, skipped = optimizer_step(run, loss)
    run.watch.remember(run.step, loss, grad_norm, skipped)

    record = StepRecord(
        step=run.step,
        tokens=run.step * run.resolved.config.tokens_per_step,
        loss=loss,
        z_loss=z_loss,
        lr=float(run.optimizer.param_groups[0]["lr"]),
        grad_norm=grad_norm,
        seconds=time.perf_counter() - began,
        skipped=skipped,
    )
    return record, asked_to_stop


def forward_backward(
    run: Run, batches: Iterator[Batch], count: int, *, learn: bool = True
) -> list[Sums]:
    """Run ``count`` micro-batches on megatron-core's schedule; backward only when training.

    Returns:
        The sums of each micro-batch's score on the last pipeline stage; elsewhere nothing.
    """
    chunks, train = run.chunks, run.resolved.config.train
    micro_batches = [next(batches) for _ in range(count)]
    iterators = [iter(micro_batches) for _ in chunks]  # each chunk runs all micro-batches
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


def global_means(sums: list[Sums], asked_to_stop: bool) -> tuple[float, float, bool]:
    """Return the global batch's mean loss and z-loss, and whether any process was asked to stop.

    All processes get the same values, and so take the same decisions.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    # Tensor-parallel ranks of the last stage all have the same sums: only the first adds its own.
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for each in sums:
            for i, name in enumerate(("loss", "z_loss", "weight")):
                totals[i] += each.get(name, 0.0)
    totals[3] = float(asked_to_stop)
    dist.all_reduce(totals)
    loss, z_loss, weight, stops = totals.tolist()
    return loss / weight, z_loss / weight, stops > 0


def optimizer_step(run: Run, loss: float) -> tuple[float, bool]:
    """Take an optimizer step, unless the watch says to skip it.

    Returns:
        The gradient's norm before clipping, and whether the step was skipped.
    """
    if run.watch.may_skip:
        run.optimizer.prepare_grads()
        norm = float(run.optimizer.get_grad_norm())
        if run.watch.is_spike(loss, norm):
            return norm, True
    _, norm, _ = run.optimizer.step()
    if run.resolved.config.optimizer.bias_correction == FIRST_STEP:
        reset_step(run.optimizer)
    return float(norm or 0.0), False


# ------------------------------------------------------------------------------- after the step


def after_step(run: Run, record: StepRecord, asked_to_stop: bool) -> None:
    """Log a step; evaluate, save and export where they are due.

    Raises:
        AskedToStop: the run was asked to stop; if it has a folder, this step is saved.
    """
    config = run.resolved.config
    run.figures |= {"step": record.step, "tokens": record.tokens, "train_loss": record.loss}
    run.log.step(record)
    if run.checkpointer is not None:
        run.checkpointer.poll()  # an asynchronous checkpoint may be ready by now

    def due(interval: int | None) -> bool:
        return run.finished or (interval is not None and record.step % interval == 0)

    if due(config.evaluation.interval):
        evaluate(run)
    exported = bool(config.export.olmo_core) and due(config.export.interval)
    if run.checkpointer is not None and (
        asked_to_stop or exported or due(config.checkpoint.interval)
    ):
        save(run, any_layout=exported)
    if exported:
        export_olmo_core(run)
    if config.export.hf and due(config.export.interval):
        export(run)
    if asked_to_stop and not run.finished:
        saved = run.checkpointer is not None
        resumes = "the same command resumes from here" if saved else "nothing was saved"
        raise AskedToStop(f"asked to stop; {resumes}")


def evaluate(run: Run) -> None:
    """Score the held-out data, if there is any."""
    batches = run.task.validation_batches()
    if batches is None:
        return
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad(), whole_parameters(run.chunks):
        sums = forward_backward(run, batches, run.task.validation_micro_batches, learn=False)
    for chunk in run.chunks:
        chunk.train()
    figures, run.stopped_early = run.task.evaluated(run.step, _global_sums(sums))
    run.figures |= {f"validation_{name}": value for name, value in figures.items()}
    run.log.evaluation(run.step, **figures)


def save(run: Run, *, any_layout: bool = False) -> None:
    """Write a checkpoint, or begin an asynchronous one; the run must have a folder.

    Args:
        any_layout: make it one that can be loaded at any layout, whatever the setting.
    """
    assert run.checkpointer is not None
    setting = run.resolved.config.checkpoint.fully_reshardable
    with whole_parameters(run.chunks):
        run.checkpointer.save(
            run.step,
            {"watch": run.watch.state()},
            {
                "decayed": run.resolved.config.optimizer.decayed,
                "trainer": run.task.trainer_state(run.step),
            },
            fully_reshardable=any_layout
            or setting == "all"
            or (setting == "last" and run.finished),
        )


def export(run: Run) -> None:
    """Write the weights as a Hugging Face checkpoint with a model card."""
    config = run.resolved.config
    folder = Path(config.export.hf or ".") / f"step_{run.step}"
    save_weights(run, folder)
    on_first(lambda: write_card(folder, config, run.figures))
    run.log.event("export", run.step, path=str(folder))


def export_olmo_core(run: Run) -> None:
    """Convert the checkpoint of this step to one of OLMo-core, with optimizer state."""
    config, checkpointer = run.resolved.config, run.checkpointer
    assert checkpointer is not None
    checkpointer.finish()
    source = iteration_folder(checkpointer.root, run.step)
    folder = Path(config.export.olmo_core or ".") / f"step{run.step}"
    options = ExportOptions(to="olmo-core", optimizer=True)
    export_checkpoint(
        source, folder, options, WriteOptions(overwrite=True)
    )  # divided among the processes
    run.log.event("export", run.step, path=str(folder))


def save_weights(run: Run, folder: Path) -> None:
    """Write the weights and the tokenizer as a Hugging Face checkpoint, replacing an older one."""
    artifacts = run.task.tokenizer_folder
    with whole_parameters(run.chunks):
        save_hf(run.chunks, run.resolved.bridge, folder, artifacts_folder=artifacts, overwrite=True)


@contextlib.contextmanager
def whole_parameters(chunks: list[Any]) -> Iterator[None]:
    """Hold up-to-date parameters within this context.

    With ``parallel.overlap`` a rank receives the parameters that other ranks' optimizers have
    updated only in its next forward pass. Gather them before that.
    """
    gathering = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in gathering:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in gathering:
        chunk.enable_forward_pre_hook()


def _global_sums(sums: list[Sums]) -> Sums:
    """Return the sums over micro-batches and data-parallel ranks, in all processes, on the CPU."""
    totals: list[Sums | None] = [None]
    if sums:
        added = {
            name: torch.stack([each[name].double() for each in sums]).sum(0) for name in sums[0]
        }
        for value in added.values():
            dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
        totals = [{name: value.cpu() for name, value in added.items()}]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(totals, last, group)
    assert totals[0] is not None
    return totals[0]


# ------------------------------------------------------------------------- beginning and ending


def _must_be_saved_again(run: Run) -> bool:
    """Return whether the resumed checkpoint must be saved again, fully reshardable."""
    return (
        run.resolved.config.checkpoint.fully_reshardable == "all"
        and run.checkpointer is not None
        and not run.checkpointer.is_fully_reshardable(run.step)
    )


@contextlib.contextmanager
def _stopping_on_signals(run: Run) -> Iterator[None]:
    """On SIGTERM or Ctrl-C, save a checkpoint after the current step and stop.

    Slurm sends SIGTERM before it takes a node away. A second Ctrl-C ends the run at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if run.asked_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.asked_to_stop = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logging_the_end(run: Run) -> Iterator[None]:
    """Log the end of the run, and complete an asynchronous checkpoint."""
    try:
        yield
        if run.checkpointer is not None:
            run.checkpointer.finish()
        run.log.event("done", run.step)
    except BridgeError as error:
        if run.checkpointer is not None and isinstance(error, TrainingStopped):
            run.checkpointer.finish()
        run.log.event("stopped", run.step, message=str(error))
        raise
    finally:
        run.log.close()
