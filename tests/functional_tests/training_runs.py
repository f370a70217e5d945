"""Training runs in forked processes: what the tests of checkpoints, resuming and layouts share.

    training_runs.py FATE RECIPE KEY=VALUE...    olmo-bridge train, and what happens to it meanwhile

FATE is "lives", or one of these, which happens in the last process, or where a file is concerned in
the first:

    killed:STEP:SECONDS    SIGKILL so long after a step began
    saving:N               SIGKILL when the n-th checkpoint is written, and has no name yet
    tracking:N             SIGKILL when it has, and the tracker is not written yet
    event:N                SIGKILL before the n-th time that the run's folder is changed
    replaced:N             SIGKILL when the n-th checkpoint has taken the name of an older one
    replacing:N            SIGKILL before the n-th rename of a checkpoint to its name, where the two
                           names can't be exchanged
    deleting:N             SIGKILL when the n-th checkpoint that is too old is being deleted
    TERM:STEP, INT:STEP    that signal during a step
    vanished:N             the folder of the n-th checkpoint is deleted before anything is written
    cheated                the disk seems to have room, and has none; in all processes
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass, field
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from killable import before, die
from launching import ended
from numpy.typing import NDArray

RECIPE = """
from megatron_olmo_bridge.models.{family}.bridge import {bridge} as Bridge
from megatron_olmo_bridge.training.config import *

def config():
    return TrainingConfig(
        model=dict(Bridge.sizes["{size}"]),
        train=StepsConfig(
            steps=14, global_batch_size=4, micro_batch_size=2, sequence_length=32,
            precision="float32", seed=7,
        ),
        data=DataConfig(path=["{data}/train"], validation=["{data}/valid"], cache="{data}/cache"),
        optimizer=OptimizerConfig(lr=3e-3, z_loss=1e-4),
        schedule=ScheduleConfig(warmup_steps=4),
        evaluation=EvaluationConfig(interval=7, batches=1),
        checkpoint=CheckpointConfig(interval=4),
        logging=LoggingConfig(interval=1),
    )
"""
"""A run of some steps, each of some hundredths of a second."""
TRACKER = "latest_checkpointed_iteration.txt"
Curve = dict[int, tuple[float, float]]
"""Loss and gradient norm of each step."""


@dataclass(frozen=True)
class Place:
    """A folder for runs, with data and recipes."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Place:
        """With 60k tokens to train on, of documents that count in steps of their own."""
        random = np.random.default_rng(0)
        for name, count in (("train", 400), ("valid", 20)):
            each = [random.integers((0, 1, 20), (900, 7, 300)) for _ in range(count)]
            write_data(folder / name, [(a + b * np.arange(n)) % 1000 for a, b, n in each])
        for family, bridge, size in (
            ("olmo2", "Olmo2Bridge", "olmo2-tiny"),
            ("gpt2", "GPT2Bridge", "gpt2-tiny"),
        ):
            text = RECIPE.format(family=family, bridge=bridge, size=size, data=folder)
            (folder / f"{family}.py").write_text(text)
        return cls(folder)

    def run(
        self,
        name: str,
        *overrides: str,
        processes: int = 1,
        fate: str = "lives",
        recipe: str = "olmo2",
    ) -> Run:
        """Train, in the run's folder of that name; goes on where one is there."""
        save = f"checkpoint.save={self.folder / name}"
        codes, said = ended(
            "training_runs",
            fate,
            self.folder / f"{recipe}.py",
            save,
            *overrides,
            processes=processes,
        )
        return Run(self.folder / name, codes, said)

    def back_at(self, run: Run, step: int, name: str) -> None:
        """A copy of a run's folder under another name, as it was after a step that was saved."""
        copy = shutil.copytree(run.folder, self.folder / name)
        config = (run.folder / "run.yaml").read_text()
        (copy / "run.yaml").write_text(config.replace(str(run.folder), str(copy)))
        (copy / "run.lock").unlink(missing_ok=True)  # of a process that was killed
        for folder in copy.glob("iter_*"):
            if int(folder.name.removeprefix("iter_")) > step:
                shutil.rmtree(folder)
        (copy / TRACKER).write_text(str(step))


def write_data(prefix: Path, documents: list[NDArray[np.int64]]) -> None:
    """Write a .bin and an .idx by megatron-core; each document gets an end, 1000."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_item(torch.from_numpy(np.append(document, 1000)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@dataclass(frozen=True)
class Run:
    """A run that ended, one way or another."""

    folder: Path
    codes: list[int]
    """Exit codes of its processes; negative ones are signals."""
    said: str = field(repr=False)

    def done(self) -> Run:
        """Itself, if it came to its end."""
        assert not any(self.codes), (self.codes, self.said[-6000:])
        return self

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == kind]

    @property
    def curve(self) -> Curve:
        lines = self.events("step")
        assert len({line["step"] for line in lines}) == len(lines)
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}

    @property
    def evaluations(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.events("evaluation")}

    @property
    def tracked(self) -> int:
        return int((self.folder / TRACKER).read_text())

    @property
    def saved(self) -> list[str]:
        """Everything that begins as a checkpoint does."""
        return sorted(path.name for path in self.folder.glob("iter_*"))


def apart(a: Curve, b: Curve) -> tuple[float, float]:
    """The largest difference of losses, and the largest relative one of gradient norms, over the
    steps that both have."""
    both = sorted(a.keys() & b.keys())
    assert both
    return (
        max(abs(a[step][0] - b[step][0]) for step in both),
        max(abs(a[step][1] / b[step][1] - 1) for step in both),
    )


# ------------------------------------------------------------------------------ in the process


def main() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_olmo_bridge.cli.app import app

    # megatron-core would start an interpreter anew for this, which outlives a killed process.
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_end_with_parent)
    filesystem_async._results_queue = manager.Queue()
    _, fate, *arguments = sys.argv
    prepare(*fate.split(":"))
    if code := app(["train", *arguments], standalone_mode=False):
        sys.exit(code)


def _end_with_parent() -> None:
    set_parent_death_signal = 1
    CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def prepare(kind: str, *when: str) -> None:
    """Arrange for a fate."""
    from megatron_olmo_bridge.training import checkpoint, naming

    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    of_a_file = kind in (
        "event",
        "vanished",
        "saving",
        "tracking",
        "replaced",
        "replacing",
        "deleting",
    )
    if kind == "cheated":
        checkpoint._bytes = lambda state: 0
        return
    if kind == "lives" or rank != (0 if of_a_file else processes - 1):
        return
    match kind:
        case "killed":
            timer = threading.Timer(float(when[1]), die)
            timer.daemon = True
            in_step(int(when[0]), timer.start)
        case "saving":
            before(checkpoint, "write_texts", die, int(when[0]))
        case "tracking":
            before(Path, "replace", die, int(when[0]), lambda path, _: "latest" in path.name)
        case "vanished":
            in_save(int(when[0]), shutil.rmtree)
        case "event":
            at_change(int(when[0]), die)
        case "replaced":
            exchange = naming.exchange
            naming.exchange = lambda *paths: exchange(*paths) and die()
        case "replacing":
            naming.exchange = lambda *_: False
            named = lambda path, to: ".replaced." not in to.name and to.name.startswith("iter_")  # noqa: E731
            before(Path, "rename", die, int(when[0]), named)
        case "deleting":
            before(shutil, "rmtree", die, int(when[0]), lambda path: ".old." in str(path))
        case "TERM" | "INT":
            number = getattr(signal, f"SIG{kind}")
            in_step(int(when[0]), lambda: os.kill(os.getpid(), number))
        case _:
            raise SystemExit(f"no such fate: {kind!r}")


def at_change(nth: int, then: Callable[[], None]) -> None:
    """Do something before the n-th time that this process changes a file under the run's folder."""
    (folder,) = (a.partition("=")[2] for a in sys.argv if a.startswith("checkpoint.save="))
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
    process, count = os.getpid(), itertools.count(1)

    def changed(event: str, arguments: tuple[Any, ...]) -> bool:
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return (event in changes or writes) and folder in str(arguments[0])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changed(event, arguments) and os.getpid() == process and next(count) == nth:
            then()

    sys.addaudithook(hook)


def in_save(nth: int, then: Callable[[Path], None]) -> None:
    """Do something to the n-th checkpoint's folder before its files are written."""
    from megatron_olmo_bridge.training import checkpoint

    recording, count = checkpoint.recording, itertools.count(1)

    def replacement(request: Any, folder: Path) -> Any:
        if next(count) == nth:
            then(folder)
        return recording(request, folder)

    checkpoint.recording = replacement


def in_step(step: int, then: Callable[[], None]) -> None:
    """Do something when a step begins."""
    from megatron_olmo_bridge.training import loop

    before(loop, "one_step", then, only=lambda run, _: run.step + 1 == step)
