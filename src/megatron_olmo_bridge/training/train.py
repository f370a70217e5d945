"""Train: from a config to a run, and through it."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config

from megatron_olmo_bridge.convert.source import Source, fetch, open_source
from megatron_olmo_bridge.data.info import DataInfo, read_info
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.detect import Kind
from megatron_olmo_bridge.live.auto_bridge import AutoBridge
from megatron_olmo_bridge.models.provider import GPTModelProvider
from megatron_olmo_bridge.nn.backends import TRANSFORMER_ENGINE, resolved_name
from megatron_olmo_bridge.runtime.devices import tf32_notice
from megatron_olmo_bridge.runtime.process_groups import (
    ensure_process_groups,
    on_first,
    started_together,
)

from .checkpoint import Checkpointer, iteration_folder, last_step
from .checksums import check, recorded
from .config import TrainingConfig
from .facts import run_facts
from .folder import check_folders, claim, what_is_lost
from .layout import Layout, checks, model_of, provider_fields
from .loop import train_loop
from .monitor.run_log import RunLog
from .naming import put_back
from .optimizer import ddp_config, make_optimizer, make_scheduler
from .recipes import OVERRIDDEN
from .restore import load
from .run import Run, logged, stopping_on_signals
from .run_lock import exclusive
from .stability import Watch
from .task import LanguageModelling, Task
from .token_data import TokenData


def train(config: TrainingConfig, *, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train a model as a config says; every process of the layout calls it.

    Args:
        config: as a recipe gives it.
        say: takes what people read, line by line, in the first process.

    Returns:
        Figures of the last step: ``step``, ``tokens``, ``train_loss``, ``validation_loss``.

    Raises:
        TrainingStopped: before the last step; the message says why.
        BridgeError: the config can't be, or something that it names is not there or not sound.
    """
    config, source = resolved(config)
    with started(LanguageModel(config, source), say) as run:
        with stopping_on_signals(run), logged(run):
            train_loop(run)
        return run.figures


class Subject(Protocol):
    """What a run trains."""

    @property
    def config(self) -> TrainingConfig:
        """With its model filled in."""

    @property
    def source(self) -> Source | None:
        """The checkpoint that the weights come from, if any."""

    def task(self) -> tuple[Task, Path | None]:
        """The task, and the folder with the tokenizer's files, which go with every checkpoint and
        export. The process groups are there."""


@dataclass
class LanguageModel:
    """A model of the next token."""

    config: TrainingConfig
    source: Source | None

    def task(self) -> tuple[Task, Path | None]:
        """Open the data."""
        bridge, layout = model_of(self.config), Layout.of(self.config, dist.get_world_size())
        data = TokenData.open(self.config, bridge.vocab_size)
        task = LanguageModelling(self.config, data, bridge.vocab_size, layout.micro_batches)
        return task, tokenizer_folder(self.config, self.source, data.info)


@contextlib.contextmanager
def started(subject: Subject, say: Callable[[str], None] = print) -> Iterator[Run]:
    """Set a run up, and keep other runs out of its folders until the context ends.

    Raises:
        OutputError: another run is at work in one of its folders.
        BridgeError: as :func:`train`.
    """
    config = subject.config
    checks(config, started_together())
    provider = model_of(config).provider(**provider_fields(config))
    ensure_process_groups(
        provider, config.train.seed, timeout_minutes=config.parallel.timeout_minutes
    )
    on_first(lambda: check_folders(config))  # before anything is written, a lock too
    with exclusive(config, say):
        yield set_up(subject, provider, say)


def set_up(subject: Subject, provider: GPTModelProvider, say: Callable[[str], None]) -> Run:
    """Build everything that a run needs, and restore it if it was begun before.

    Raises:
        BridgeError: as :func:`train`.
    """
    config, source = subject.config, subject.source
    watch = Watch(config.stability)
    bridge = model_of(config)
    extension = on_first(lambda: check_folders(config))
    folder = Path(config.checkpoint.save).expanduser() if config.checkpoint.save else None
    step = _last_step(folder)
    task, beside = subject.task()
    if source is not None and step is None and not config.init.optimizer:  # load() checks it too
        check(source.folder)
    chunks, optimizer = _model_and_optimizer(config, provider, source, fill=step is None)
    checkpointer = None
    if folder is not None:
        checkpointer = Checkpointer(
            folder, bridge, chunks, optimizer, beside, config.checkpoint.keep_last,
            config.checkpoint.asynchronous,
        )  # fmt: skip
    if step is not None and checkpointer is not None:
        watch.restore(checkpointer.restore(step)["watch"])
    elif config.init.optimizer:
        assert source is not None
        load(source.folder, chunks, optimizer, fresh_rng=True)
    scheduler = make_scheduler(config, optimizer)
    scheduler.step(step or 0)
    on_first(lambda: claim(config))  # now that all else is sound
    log = None
    if dist.get_rank() == 0:
        log = RunLog(run_facts(config, bridge, task.loss_unit), config.logging, folder,
                     resumed_at=step, say=say)  # fmt: skip
        for notice in _notices(config, provider, step):
            say(f">> {notice}")
        if checkpointer is not None:
            checkpointer.on_saved = lambda at, path: log.event("checkpoint", at, path=str(path))
        if extension is not None:
            log.event("extended", step or 0, message=extension.message())
    return Run(
        config, bridge, chunks, optimizer, scheduler, task,
        Layout.of(config, dist.get_world_size()).micro_batches, watch, checkpointer,
        log, beside, step or 0,
    )  # fmt: skip


def _notices(config: TrainingConfig, provider: GPTModelProvider, step: int | None) -> Iterator[str]:
    """What one should know when a run begins, or goes on from a step, and might not expect."""
    if lost := what_is_lost(config):
        yield lost
    with_te = resolved_name(provider.backend) == TRANSFORMER_ENGINE
    precision = config.train.precision
    if notice := tf32_notice(precision, transformer_engine=with_te, env=os.environ):
        yield notice
    if step is not None and config.checkpoint.save is not None:
        folder = iteration_folder(Path(config.checkpoint.save).expanduser(), step)
        if recorded(folder) is None:
            yield f"{folder}: has no checksums, so damaged bytes in it would not be noticed"


def _last_step(folder: Path | None) -> int | None:
    """The step that a run goes on from, if it was begun before."""
    if folder is None:
        return None
    on_first(lambda: put_back(folder))
    return last_step(folder)


def resolved(config: TrainingConfig) -> tuple[TrainingConfig, Source | None]:
    """The config with its model filled in, and the checkpoint that the weights come from, if any.

    Raises:
        BridgeError: there is no such checkpoint, it is not sound, or the data is another model's.
    """
    init = config.init
    if not (init.hf or init.checkpoint):
        return _ending_as_its_data(config), None
    for key, said in config.sources.items():
        if key.startswith("model.") and said == OVERRIDDEN:
            raise InputError(
                f"{key}: the model is that of init.hf or init.checkpoint, as it is there"
            )
    given = fetch(init.hf, init.revision)[0] if init.hf else init.checkpoint
    source = open_source(given or "")
    if init.optimizer and source.kind is not Kind.MEGATRON:
        raise InputError(
            f"{given}: has no optimizer's state, being no Megatron checkpoint; leave out "
            "init.optimizer"
        )
    return replace(config, model=source.bridge.hf_config), source


def _ending_as_its_data(config: TrainingConfig) -> TrainingConfig:
    """The config of a new model that ends a text as the data's documents end: else nobody who
    generates with it would know where to stop.

    Raises:
        InputError: the model ends it otherwise.
    """
    if not config.data.path:
        return config
    name, theirs = "eos_token_id", read_info(Path(config.data.path[0])).eos_id
    mine = config.model.get(name)
    if theirs is None or theirs == mine:
        return config
    if mine is not None:
        raise InputError(
            f"the documents of {config.data.path[0]} end with token {theirs}, a text of the model "
            f"with {mine}: prepare them with the model's tokenizer, or set model.{name}={theirs}"
        )
    return replace(config, model=config.model | {name: theirs})


def _model_and_optimizer(
    config: TrainingConfig, provider: GPTModelProvider, source: Source | None, fill: bool
) -> tuple[list[Any], Any]:
    """The chunks wrapped for training, with the weights of a source or random ones.

    Args:
        fill: otherwise the weights don't matter: a checkpoint of the run will set them.
    """
    provider.initialize = source is None and fill
    if source is not None and fill:
        provider.register_pre_wrap_hook(AutoBridge(source.bridge, source).load_hf_weights)
    chunks = provider.provide_distributed_model(ddp_config(config.parallel), seed=config.train.seed)
    optimizer = make_optimizer(config, chunks)
    megatron = get_model_config(chunks[0])
    megatron.finalize_model_grads_func = finalize_model_grads
    # Weak: a distributed optimizer holds views of the parameters, which the garbage collector can't
    # follow, and would keep the model, and the model it, for the life of the process.
    reference: Callable[[], Any] = weakref.ref(optimizer)
    megatron.grad_scale_func = lambda loss: reference().scale_loss(loss)
    if config.parallel.overlap:
        # Gradients of all but the last micro-batch stay where they are.
        megatron.no_sync_func = [chunk.no_sync for chunk in chunks]
        if len(chunks) == 1:
            megatron.no_sync_func = megatron.no_sync_func[0]
    return chunks, optimizer


def tokenizer_folder(
    config: TrainingConfig, source: Source | None, prepared: list[DataInfo]
) -> Path | None:
    """Folder with the tokenizer's files, which go with every checkpoint and export.

    Raises:
        InputError: ``data.tokenizer`` names one that isn't there.
    """
    if config.data.tokenizer is None and source is not None and source.side_folder is not None:
        return source.side_folder
    named = config.data.tokenizer or prepared[0].tokenizer
    if named is None or Path(named).is_dir():
        return Path(named) if named else None
    if Path(named).is_file():
        raise InputError(f"data.tokenizer={named}: is a file; name the tokenizer's folder")
    if config.data.tokenizer is None:
        return None  # prepared elsewhere, with a tokenizer that isn't here
    return fetch(named, None)[0]
