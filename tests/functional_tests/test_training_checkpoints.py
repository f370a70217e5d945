"""Checkpoints of a run are complete or absent, kept or deleted as configured, and usable.

Also tests what a run may start from, and that a failed run damages nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("megatron.core")

import torch
from launching import TOKENS, olmo_bridge, stock, tokens_argument
from training_runs import TRACKER, Place, Run, apart, write_data
from transformers import AutoModelForCausalLM
from trees import tree_hash

CONSTANT = ("schedule.decay=constant", "schedule.warmup_steps=0")
SPIKY = ("stability.window=4", "stability.sigma=0.2")
"""Nearly every loss above the mean counts as a spike."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Run:
    """Uninterrupted run at TP 2 with exports."""
    return place.run(
        "whole",
        "parallel.tp=2",
        f"export.hf={place.folder}/exports",
        "export.interval=4",
        processes=2,
    ).done()


@pytest.fixture(scope="module")
def alone(place: Place) -> Run:
    """Uninterrupted run in one process."""
    return place.run("alone").done()


def complete(run: Run) -> bool:
    """Return whether every checkpoint of a run is readable and the tracker names one of them."""
    read = [olmo_bridge("inspect", run.folder / name).exit_code for name in run.saved]
    return not any(read) and f"iter_{run.tracked:07d}" in run.saved


def refused(run: Run) -> str:
    """Return the message of a run that was refused without a traceback."""
    assert 2 in run.codes, run.said
    assert "Traceback" not in run.said
    return run.said[run.said.index("olmo-bridge: ") :]


# ------------------------------------------------------------------------------------ after it


def test_exports_while_training_are_the_checkpoints(place: Place, whole: Run) -> None:
    """They equal the checkpoints of the same steps and the output of ``export`` bit for bit."""
    exports = place.folder / "exports"
    assert sorted(p.name for p in exports.iterdir()) == ["step_12", "step_14", "step_4", "step_8"]
    for step in (4, 14):
        checkpoint = whole.folder / f"iter_{step:07d}"
        verified = olmo_bridge("verify", checkpoint, exports / f"step_{step}")
        assert verified.exit_code == 0, verified.output
    assert olmo_bridge("export", whole.folder, place.folder / "exported").exit_code == 0
    exported = place.folder / "exported"
    assert olmo_bridge("verify", exported, exports / "step_14").exit_code == 0
    assert olmo_bridge("verify", exported, exports / "step_4").exit_code == 1


@pytest.mark.parametrize("tp", [1, 2])
def test_checkpoints_load_in_stock_megatron(place: Place, whole: Run, tp: int) -> None:
    hf, logits = place.folder / "exports/step_14", place.folder / f"logits-{tp}.pt"
    stock(
        "load",
        "--hf",
        hf,
        "--checkpoint",
        whole.folder / "iter_0000014",
        "--strict",
        "raise_unexpected",
        "--tokens",
        tokens_argument(),
        "--logits",
        logits,
        "--tp",
        tp,
        processes=tp,
    )
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits
    assert (torch.load(logits) - expected).abs().max() <= 1e-5


# ------------------------------------------------------------------------- whole or not there


def test_an_incomplete_checkpoint_is_never_resumed(place: Place, alone: Run) -> None:
    killed = place.run("half", fate="saving:2")
    half = killed.folder / "iter_0000008.partial"
    assert killed.saved == ["iter_0000004", half.name]
    assert killed.tracked == 4
    for command in ("inspect", "verify"):
        assert olmo_bridge(command, half).exit_code == 2
    assert olmo_bridge("export", half, place.folder / "of-half").exit_code == 2
    assert olmo_bridge("inspect", killed.folder).exit_code == 0

    run = place.run("half", "checkpoint.interval=100").done()

    assert run.saved == ["iter_0000004", "iter_0000014"]
    assert run.curve == alone.curve
    assert complete(run)


def test_only_the_last_checkpoints_are_kept(place: Place, alone: Run) -> None:
    last_two = ("checkpoint.keep_last=2", "checkpoint.interval=3")
    killed = place.run("kept", *last_two, fate="deleting:1")
    assert killed.saved == ["iter_0000003.old.partial", "iter_0000006", "iter_0000009"]
    assert killed.tracked == 9

    run = place.run("kept", *last_two).done()

    assert run.saved == ["iter_0000012", "iter_0000014"]
    assert run.curve == alone.curve
    assert complete(run)


@pytest.mark.slow
def test_a_checkpoint_is_saved_asynchronously(place: Place, whole: Run) -> None:
    """At TP 2, also after a kill and a stop, each checkpoint equals one saved synchronously."""
    overrides = ("parallel.tp=2", "checkpoint.asynchronous=true")
    killed = place.run("meanwhile", *overrides, processes=2, fate="killed:10:0.02")
    assert set(killed.codes) == {-9}
    assert killed.tracked in (4, 8)
    stopped = place.run("meanwhile", *overrides, processes=2, fate="TERM:11")
    assert stopped.tracked == 11

    run = place.run("meanwhile", *overrides, processes=2).done()

    assert run.saved == [f"iter_{step:07d}" for step in (4, 8, 11, 12, 14)]
    assert run.curve == whole.curve
    assert complete(run)
    for step in (4, 12, 14):
        name = f"iter_{step:07d}"
        assert olmo_bridge("verify", run.folder / name, whole.folder / name).exit_code == 0


# ------------------------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 20 MiB, with room for one checkpoint of 12 MB but not for two."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "none", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("a small file system can't be mounted here: needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fate", "overrides", "says"),
    [
        ("lives", (), r": a checkpoint takes 0.0\d GB and 0.0\d GB are free"),
        ("cheated", (), r"can't save a checkpoint: .*; a checkpoint takes .* 0.0\d GB are free"),
        ("cheated", ("checkpoint.asynchronous=true",), "can't save a checkpoint: .* GB are free"),
    ],
    ids=["foreseen", "meanwhile", "asynchronous"],
)
def test_a_full_disk_stops_the_run(
    place: Place, alone: Run, disk: Path, fate: str, overrides: tuple[str, ...], says: str
) -> None:
    """The run prints one message; earlier checkpoints stay intact, and the run resumes from
    them."""
    full = place.run(f"{disk}/run", *overrides, fate=fate)
    message = refused(full)
    assert re.search(says, message)
    assert "free some space" in message
    assert full.saved == ["iter_0000004"]
    assert complete(full)

    subprocess.run(["mount", "-o", "remount,size=80m", disk], check=True)
    run = place.run(f"{disk}/run", *overrides).done()

    assert run.curve == alone.curve
    assert complete(run)


@pytest.mark.slow
def test_a_full_disk_stops_both_processes(place: Place, disk: Path) -> None:
    full = place.run(f"{disk}/run", processes=2, fate="cheated")
    assert re.search("can't save a checkpoint: .* GB are free", refused(full))
    assert full.saved == ["iter_0000004"]


@pytest.mark.parametrize("overrides", [(), ("checkpoint.asynchronous=true",)], ids=["", "async"])
def test_another_error_while_saving_is_reported(place: Place, overrides: tuple[str, ...]) -> None:
    """The message says what happened and, as the disk has space, doesn't ask to free some."""
    name = "-".join(["vanished", *overrides])
    run = place.run(name, *overrides, fate="vanished:2")
    message = refused(run)
    assert "can't save a checkpoint: " in message
    assert "No such file or directory" in message
    assert f"{run.folder}/iter_0000008.partial" in message
    assert "free" not in message
    assert "the same command resumes from the last of them" in message
    assert run.saved == ["iter_0000004"]
    assert complete(run)


# -------------------------------------------------------------------------- what it begins from


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(place: Place, alone: Run) -> None:
    """The layout may differ; the first loss is that of the weights, the schedule starts anew."""
    init = f"init.checkpoint={alone.folder}"
    run = place.run("after", init, "parallel.tp=2", "train.steps=5", processes=2).done()
    exported = place.folder / "of-alone"
    assert olmo_bridge("export", alone.folder, exported).exit_code == 0

    same = place.run("after-hf", f"init.hf={exported}", "train.steps=5").done()

    assert apart(run.curve, same.curve)[0] < 1e-5
    assert run.evaluations[0] == pytest.approx(alone.evaluations[14], abs=1e-6)


@pytest.mark.slow
def test_a_run_starts_from_the_optimizer_state_of_another(place: Place) -> None:
    """On data with equal batches, a run that starts from another's weights and moments equals that
    run continued; a run that starts from the weights alone does not."""
    write_data(place.folder / "constant", [np.arange(31)] * 400)
    settings = (f"data.path={place.folder}/constant", "data.validation=[]", *CONSTANT)
    long = place.run("long", *settings, "train.steps=12").done()
    place.run("first", *settings, "train.steps=6").done()
    init = f"init.checkpoint={place.folder}/first"

    second = place.run("second", *settings, "train.steps=6", init, "init.optimizer=true").done()
    weights = place.run("weights", *settings, "train.steps=6", init).done()
    slower = place.run(
        "slower",
        *settings,
        "train.steps=6",
        init,
        "init.optimizer=true",
        "optimizer.lr=1e-4",
        "parallel.tp=2",
        processes=2,
    ).done()

    later = {step - 6: values for step, values in long.curve.items() if step > 6}
    assert second.curve == later
    assert weights.curve[1] == later[1]
    assert apart(weights.curve, later)[0] > 1e-2
    assert {line["lr"] for line in slower.events("step")} == {1e-4}
    assert abs(slower.curve[6][0] - later[1][0]) < abs(later[6][0] - later[1][0])


def test_a_run_that_saves_nothing_says_so(place: Place) -> None:
    """The warning comes at the start."""
    run = place.run("nothing", "checkpoint.save=null", "train.steps=5").done()
    lost = ">> No checkpoint, log or report will be saved, and the trained weights will be lost"
    assert lost in run.said.partition("1/5")[0]
    assert not run.folder.exists()


@pytest.mark.slow
def test_runs_are_not_mixed(place: Place, alone: Run, whole: Run) -> None:
    before = tree_hash(alone.folder)
    other = place.run("alone", "optimizer.lr=1e-3", "train.steps=20")
    message = refused(other)
    assert "train.steps: was 14, is 20" in message
    assert "optimizer.lr: was 0.003, is 0.001" in message
    itself = place.run("alone", f"init.checkpoint={alone.folder}")
    assert "would mix" in refused(itself)
    assert tree_hash(alone.folder) == before

    foreign = shutil.copytree(whole.folder, place.folder / "foreign")
    (foreign / "run.yaml").unlink()
    assert "no run of this command saved" in refused(place.run("foreign"))


# -------------------------------------------------------------------------------- gone wrong


@pytest.mark.parametrize("overrides", [(), ("checkpoint.asynchronous=true",)], ids=["", "async"])
def test_a_loss_of_nan_stops_the_run(place: Place, overrides: tuple[str, ...]) -> None:
    name = "-".join(["nan", *overrides])
    run = place.run(
        name,
        "optimizer.lr=1e9",
        "schedule.warmup_steps=0",
        "checkpoint.interval=1",
        "parallel.tp=2",
        *overrides,
        processes=2,
    )

    assert "the loss of step 2 is nan. The weights were not changed by it." in refused(run)
    assert run.events("stopped")[0]["step"] == 2
    assert run.saved == ["iter_0000001"]
    assert complete(run)


@pytest.mark.slow
def test_a_spike_is_skipped_or_stops_the_run(place: Place) -> None:
    """Spikes are skipped also after a restart: the state of the spike detection is saved."""
    stopped = place.run("spike", *SPIKY)
    assert "the loss spiked to" in refused(stopped)

    whole = place.run("skips", *SPIKY, "stability.on_spike=skip").done()
    skipped = [line["step"] for line in whole.events("skipped")]
    assert skipped
    place.run("skips-on", *SPIKY, "stability.on_spike=skip", fate=f"TERM:{skipped[-1] - 1}")
    again = place.run("skips-on", *SPIKY, "stability.on_spike=skip").done()

    assert again.curve == whole.curve
    assert [line["step"] for line in again.events("skipped")] == skipped


def test_a_tracker_that_names_no_checkpoint_is_refused(place: Place, alone: Run) -> None:
    copy = shutil.copytree(alone.folder, place.folder / "lost")
    (copy / "run.yaml").write_text(
        (alone.folder / "run.yaml").read_text().replace(str(alone.folder), str(copy))
    )
    (copy / TRACKER).write_text("13")
    assert "names iter_0000013, which is not there" in refused(place.run("lost"))
