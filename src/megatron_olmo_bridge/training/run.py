"""A training run: set up from a config, or continued from its folder."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megatron_olmo_bridge.convert.model_card import write_model_card
from megatron_olmo_bridge.convert.source import hub_repository
from megatron_olmo_bridge.errors import AskedToStop, BridgeError, TrainingStopped
from megatron_olmo_bridge.live.save import save_hf
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.runtime.process_groups import on_first

from .checkpoint import Checkpointer
from .config import TrainingConfig
from .facts import card_facts
from .loop import forward_backward, total
from .monitor.run_log import RunLog, StepRecord
from .stability import Watch
from .task import Task


@dataclass
class Run:
    """All that the loop works on."""

    config: TrainingConfig
    bridge: ModelBridge
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    task: Task
    micro_batches: int
    watch: Watch
    checkpointer: Checkpointer | None
    log: RunLog | None
    """In the first process."""
    beside: Path | None = None
    """Folder with the tokenizer's files."""
    step: int = 0
    """Optimizer steps that were taken."""
    asked_to_stop: bool = False
    stopped_early: bool = False
    """The task says that going on is of no use."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last step and the last evaluation."""

    @property
    def finished(self) -> bool:
        return self.stopped_early or self.step >= self.config.train.steps

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def clear_gradients(self) -> None:
        """Before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def after_step(self, record: StepRecord, asked_to_stop: bool) -> None:
        """What is due after a step: a line, an evaluation, a checkpoint, an export.

        Raises:
            AskedToStop: after a checkpoint of this step.
        """
        config = self.config
        self.figures |= {"step": record.step, "tokens": record.tokens, "train_loss": record.loss}
        if self.log is not None:
            self.log.step(record)
        if self.checkpointer is not None:
            self.checkpointer.poll()

        def due(interval: int | None) -> bool:
            return self.finished or (interval is not None and record.step % interval == 0)

        if due(config.evaluation.interval):
            self.evaluate()
        if self.checkpointer is not None and (asked_to_stop or due(config.checkpoint.interval)):
            self.save()
        if config.export.hf and due(config.export.interval):
            self.export()
        if asked_to_stop and not self.finished:
            raise AskedToStop("asked to stop; the same command goes on from here")

    def save(self) -> None:
        """Write a checkpoint, or begin to; the run must have a folder."""
        assert self.checkpointer is not None
        wanted = self.config.checkpoint.fully_reshardable
        with self.whole_parameters():
            self.checkpointer.save(
                self.step,
                {"watch": self.watch.state()},
                fully_reshardable=wanted == "all" or (wanted == "last" and self.finished),
            )

    def saved_for_one_layout_only(self) -> bool:
        """Whether the checkpoint that the run goes on from is to be saved again for any layout."""
        return (
            self.config.checkpoint.fully_reshardable == "all"
            and self.checkpointer is not None
            and not self.checkpointer.is_fully_reshardable(self.step)
        )

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Have each process hold what the others' optimizers have changed: where gathering
        overlaps with computing, that comes with the next forward pass only."""
        gathering = [chunk for chunk in self.chunks if chunk.ddp_config.overlap_param_gather]
        for chunk in gathering:
            chunk.disable_forward_pre_hook(param_sync=True)
        yield
        for chunk in gathering:
            chunk.enable_forward_pre_hook()

    def evaluate(self) -> None:
        """Score the held-out data, if there is any."""
        batches = self.task.validation_batches()
        if batches is None:
            return
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), self.whole_parameters():
            sums = forward_backward(self, batches, self.task.validation_micro_batches, learn=False)
        for chunk in self.chunks:
            chunk.train()
        figures, self.stopped_early = self.task.evaluated(self.step, total(sums))
        self.figures |= {f"validation_{name}": value for name, value in figures.items()}
        if self.log is not None:
            self.log.evaluation(self.step, **figures)

    def export(self) -> None:
        """Write the weights as a Hugging Face checkpoint."""
        folder = Path(self.config.export.hf or ".") / f"step_{self.step}"
        with self.whole_parameters():
            save_hf(self.chunks, self.bridge, folder, beside=self.beside, overwrite=True)
        base = self.config.init.hf
        on_first(
            lambda: write_model_card(
                folder,
                name=self.config.name,
                base=hub_repository(base) if base else None,
                training=card_facts(self.config, self.figures),
            )
        )
        if self.log is not None:
            self.log.event("export", self.step, path=str(folder))


@contextlib.contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """SIGTERM (Slurm's, before it takes a node away) and Ctrl-C end the run after its next step,
    with a checkpoint. A second Ctrl-C ends it at once."""
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
def logged(run: Run) -> Iterator[None]:
    """Note in the run's log how it ended, and complete what is being written."""
    try:
        yield
        if run.checkpointer is not None:
            run.checkpointer.finish()
        if run.log is not None:
            run.log.event("done", run.step)
    except BridgeError as error:
        if run.checkpointer is not None and isinstance(error, TrainingStopped):
            run.checkpointer.finish()
        if run.log is not None:
            run.log.event("stopped", run.step, message=str(error))
        raise
    finally:
        if run.log is not None:
            run.log.close()
