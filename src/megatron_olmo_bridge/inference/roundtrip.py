"""Roundtrip of a checkpoint: live model, stock save and export, each compared with the source."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_olmo_bridge.checkpoints.hf import HFCheckpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.convert.to_hf import export_checkpoint
from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.formats.remote_path import here
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.tools.verify import Verification, verify

from .compare import comparison, random_tokens
from .jobs import Job, Tell, read_states


@dataclass(frozen=True)
class Step:
    """Outcome of one step."""

    name: str
    ok: bool
    result: str
    seconds: float


@dataclass
class Roundtrip:
    """Outcome of :func:`roundtrip`."""

    steps: list[Step] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if weights and logits are the same after every step."""
        return all(step.ok for step in self.steps)


def roundtrip(
    hf: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    sp: bool = False,
    ep: int = 1,
    tokens: int = 64,
    work: str | Path | None = None,
    tell: Tell = lambda _: None,
) -> Roundtrip:
    """Load a Hugging Face checkpoint live, save it with stock megatron-core and export the save.

    Weights are compared bit for bit, logits with those of transformers.

    Args:
        hf: a folder or hub id.
        tp, pp, sp, ep: tensor and pipeline parallel size, sequence parallelism, expert parallel
            size.
        tokens: number of tokens to compare logits on.
        work: folder for two copies of the model, which are removed at the end; by default the
            system's temporary folder.
        tell: called with each step as it begins.

    Raises:
        BridgeError: the checkpoint is damaged, the layout is impossible, or the disk is too small.
    """
    source = open_checkpoint(fetch(str(hf), None)[0])
    here(source.path)  # transformers reads it
    if not isinstance(source, HFCheckpoint):
        raise InputError(f"{source.path}: the roundtrip begins with a Hugging Face checkpoint")
    outcome, batch = Roundtrip(), [random_tokens(source, tokens)]
    dtype = source.dtypes[0]
    layout = f"TP {tp}{', SP' * sp}, PP {pp}" + (f", EP {ep}" if ep > 1 else "")

    @contextmanager
    def step(name: str) -> Iterator[Callable[[bool, str], None]]:
        tell(name)
        begin = time.monotonic()
        yield lambda ok, result: outcome.steps.append(
            Step(name, ok, result, time.monotonic() - begin)
        )

    with tempfile.TemporaryDirectory(prefix="olmo-bridge-", dir=work) as name:
        folder = Path(name)
        _check_room(folder, 2 * sum(view.nbytes for view in source.tensors.values()))
        saved, back, states = folder / "megatron", folder / "hf", folder / "states"
        states.mkdir()
        with step(f"load at {layout}, run, save with stock megatron-core") as done:
            job = Job(str(source.path), tp, pp, sp, ep, dtype, batch, str(states), str(saved))
            job.run(tell)
            done(True, f"{source.parameter_count:,} parameters in {dtype}")
        with step("verify the save against the source") as done:
            done(*_verdict(verify(source.path, saved)))
        with step("export the save") as done:
            export_checkpoint(saved, back)
            done(True, "without a model, without a GPU")
        with step("verify the export against the source") as done:
            done(*_verdict(verify(source.path, back)))
        with step("compare logits with transformers") as done:
            compared = comparison(source, read_states(states), batch, dtype, tell=tell)
            differs = "" if compared.equal else f"; they differ from {compared.differs_from} on"
            done(compared.equal, compared.verdict + differs)
    return outcome


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent}: the disk is too small for two copies of the model: {needed:,} bytes "
            f"needed, {free:,} free. Name another folder with --work."
        )


def _verdict(result: Verification) -> tuple[bool, str]:
    if result.equal:
        return True, f"{result.compared} tensors equal, bit for bit"
    first = result.differences[0]
    return False, f"{len(result.differences)} differences; {first.name}: {first.detail}"
