"""Set a run up for the training loop: a new run, or one restored from its folder."""

from __future__ import annotations

import contextlib
import os
import platform
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.formats.remote_path import here
from megatron_olmo_bridge.live.auto_bridge import AutoBridge
from megatron_olmo_bridge.runtime.devices import tf32_notice
from megatron_olmo_bridge.runtime.process_groups import ensure_process_groups, on_first

from .checkpoint import Checkpointer, iteration_folder, last_step
from .checksums import check, recorded
from .config import LoggingConfig
from .extension import Extension
from .folder import check_folders, claim, what_is_lost
from .loop import Run
from .model_size import flops_per_token, parameter_count
from .monitor.records import RunFacts
from .monitor.run_log import RunLog
from .naming import put_back
from .optimizer import ddp_config, make_optimizer, make_scheduler
from .recipes import as_dict
from .resolve import ResolvedRun
from .restore import load_initial
from .run_lock import exclusive
from .stability import Watch
from .task import Task


@contextlib.contextmanager
def started(
    resolved: ResolvedRun, make_task: Callable[[ResolvedRun], Task], say: Callable[[str], None]
) -> Iterator[Run]:
    """Set a run up, and keep other runs out of its folders until the context ends.

    Args:
        resolved: the run, resolved for the number of processes that call this.
        make_task: opens the data; called after the process groups are created.
        say: prints a line for people; called in the first process.

    Raises:
        OutputError: another run uses one of its folders.
        BridgeError: a file that the config names is missing or damaged.
    """
    config = resolved.config
    ensure_process_groups(
        resolved.provider, config.train.seed, timeout_minutes=config.parallel.timeout_minutes
    )
    on_first(lambda: check_folders(config))  # before anything is written, even a lock
    with exclusive(config, say):
        yield _set_up(resolved, make_task, say)


def _set_up(
    resolved: ResolvedRun, make_task: Callable[[ResolvedRun], Task], say: Callable[[str], None]
) -> Run:
    config, source = resolved.config, resolved.source
    # Check again: until the folders were locked, another run could still write into them.
    extension = on_first(lambda: check_folders(config))
    folder, step = config.folder, None
    if folder is not None:
        on_first(lambda: put_back(folder))
        step = last_step(folder)
    task = make_task(resolved)
    if source is not None and step is None and not config.init.optimizer:
        check(here(source.path))  # with init.optimizer, load() checks it
    chunks, optimizer = _model_and_optimizer(resolved, is_new=step is None)
    checkpointer = None
    if folder is not None:
        checkpointer = Checkpointer(
            folder,
            resolved.bridge,
            chunks,
            optimizer,
            task.tokenizer_folder,
            config.checkpoint.keep_last,
            config.checkpoint.asynchronous,
        )
    watch = Watch(config.stability)
    if step is not None and checkpointer is not None:
        watch.restore(checkpointer.restore(step)["watch"])
    elif config.init.optimizer:
        assert source is not None
        load_initial(source, chunks, optimizer)
    scheduler = make_scheduler(config, optimizer)
    begin = (config.init.step or 0) if step is None else step
    scheduler.step(begin)
    on_first(lambda: claim(config))  # last, so that a failed start leaves the folder as it was
    log = _open_log(resolved, task.loss_unit, step, extension, say)
    if checkpointer is not None:
        checkpointer.on_saved = lambda at, path: log.event("checkpoint", at, path=str(path))
    return Run(resolved, task, chunks, optimizer, scheduler, watch, checkpointer, log, step=begin)


def _model_and_optimizer(resolved: ResolvedRun, is_new: bool) -> tuple[list[Any], Any]:
    """Build the model's chunks, wrapped for training, and their optimizer.

    Weights are those of the source, or random; those of a run that is not new are left unset, as
    its checkpoint will set them.
    """
    config, source, provider = resolved.config, resolved.source, resolved.provider
    provider.initialize = source is None and is_new
    if source is not None and is_new:
        provider.register_pre_wrap_hook(AutoBridge(source.bridge, source).load_hf_weights)
    chunks = provider.provide_distributed_model(ddp_config(config.parallel), seed=config.train.seed)
    optimizer = make_optimizer(config, chunks)
    megatron_config = get_model_config(chunks[0])
    megatron_config.finalize_model_grads_func = finalize_model_grads
    # A weak reference: a distributed optimizer holds views of the parameters, which the garbage
    # collector can't follow. A strong one would keep model and optimizer alive with each other.
    reference: Callable[[], Any] = weakref.ref(optimizer)
    megatron_config.grad_scale_func = lambda loss: reference().scale_loss(loss)
    if config.parallel.overlap:
        # Only the last micro-batch of a step reduces gradients.
        megatron_config.no_sync_func = [chunk.no_sync for chunk in chunks]
        if len(chunks) == 1:
            megatron_config.no_sync_func = megatron_config.no_sync_func[0]
    return chunks, optimizer


def _open_log(
    resolved: ResolvedRun,
    loss_unit: str,
    step: int | None,
    extension: Extension | None,
    say: Callable[[str], None],
) -> RunLog:
    """Open the log, new or resumed at ``step``, and print what people might not expect.

    Only the first process writes and prints.
    """
    config, facts = resolved.config, _run_facts(resolved, loss_unit)
    if dist.get_rank() != 0:
        return RunLog(facts, LoggingConfig(), None, say=lambda line: None)
    log = RunLog(facts, config.logging, config.folder, resumed_at=step, say=say)
    for notice in _notices(resolved, step):
        say(f">> {notice}")
    if extension is not None:
        log.event("extended", step or 0, message=extension.message())
    return log


def _notices(resolved: ResolvedRun, step: int | None) -> Iterator[str]:
    config = resolved.config
    if lost := what_is_lost(config):
        yield lost
    with_te = resolved.provider.modules.transformer_engine
    if notice := tf32_notice(config.train.precision, transformer_engine=with_te, env=os.environ):
        yield notice
    if step is not None and config.folder is not None:
        checkpoint = iteration_folder(config.folder, step)
        if recorded(checkpoint) is None:
            yield f"{checkpoint}: has no checksums, so damaged bytes in it would not be noticed"


def _run_facts(resolved: ResolvedRun, loss_unit: str) -> RunFacts:
    config, bridge = resolved.config, resolved.bridge
    return RunFacts(
        name=config.name,
        steps=config.train.steps,
        tokens_per_step=config.tokens_per_step,
        parameters=parameter_count(bridge),
        flops_per_token=flops_per_token(bridge, config.train.sequence_length),
        processes=dist.get_world_size(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        config=as_dict(config),
        versions={
            "megatron-olmo-bridge": __version__,
            "megatron-core": megatron.core.__version__,
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        loss_unit=loss_unit,
    )
