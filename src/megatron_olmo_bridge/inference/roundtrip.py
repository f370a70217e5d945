"""The roundtrip: live model, stock save, export, and proof that nothing was lost on the way."""

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
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.tools.verify import Verification, verify

from .compare import comparison, random_tokens
from .difference import Comparison
from .jobs import Job, Tell, read_states


@dataclass(frozen=True)
class Step:
    """One step, what it found, and how long it took."""

    name: str
    ok: bool
    result: str
    seconds: float


@dataclass
class Roundtrip:
    """What :func:`roundtrip` found."""

    steps: list[Step] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost."""
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
    """Load a Hugging Face checkpoint live, save it with stock megatron-core, export that, and
    compare: weights bit for bit, logits with those of transformers.

    Args:
        hf: a folder or hub id.
        tp, pp, sp, ep: tensor and pipeline parallel size, sequence parallelism, expert parallel
            size.
        tokens: how many to compare logits on.
        work: folder for two copies of the model, removed afterwards; a temporary one if absent.
        tell: called with each step's name as it begins.

    Raises:
        BridgeError: the checkpoint is not sound, the layout can't be, or the disk is too small.
    """
    source = open_checkpoint(fetch(str(hf), None)[0])
    if not isinstance(source, HFCheckpoint):
        raise InputError(f"{hf}: the roundtrip begins with a Hugging Face checkpoint")
    found, batch = Roundtrip(), [random_tokens(source, tokens)]
    dtype = source.dtypes[0]
    layout = f"TP {tp}{', SP' * sp}, PP {pp}" + (f", EP {ep}" if ep > 1 else "")

    @contextmanager
    def step(name: str) -> Iterator[Callable[[bool, str], None]]:
        tell(name)
        begin = time.monotonic()
        yield lambda ok, result: found.steps.append(
            Step(name, ok, result, time.monotonic() - begin)
        )

    with tempfile.TemporaryDirectory(prefix="olmo-bridge-", dir=work) as name:
        folder = Path(name)
        _check_room(folder, 2 * sum(view.nbytes for view in source.tensors.values()))
        saved, back, states = folder / "megatron", folder / "hf", folder / "states"
        states.mkdir()
        with step(f"load at {layout}, run, save with stock megatron-core") as done:
            Job(
                str(source.path), tp, pp, sp, ep, dtype=dtype, tokens=batch, states=str(states),
                save=str(saved),
            ).run(tell)  # fmt: skip
            done(True, f"{source.parameters:,} parameters in {dtype}")
        with step("verify the save against the source") as done:
            done(*_verdict(verify(source.path, saved)))
        with step("export the save") as done:
            export_checkpoint(saved, back)
            done(True, "without a model, without a GPU")
        with step("verify the export against the source") as done:
            done(*_verdict(verify(source.path, back)))
        with step("compare logits with transformers") as done:
            found_states = read_states(states)
            done(*_logits(comparison(source, found_states, batch, dtype, tell=tell)))
    return found


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


def _logits(result: Comparison) -> tuple[bool, str]:
    apart = "" if result.equal else f"; they differ from {result.parts_at} on"
    return result.equal, result.verdict + apart
