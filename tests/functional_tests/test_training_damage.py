"""Damage to a run's saved checkpoints is found before anything is loaded."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from flipped_bytes import flip
from launching import olmo_bridge, run_script
from training_runs import Place, Run
from trees import tree_hash

RECORD = "olmo_bridge.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Run:
    return place.run("whole").done()


@pytest.fixture(scope="module")
def stopped(place: Place) -> Run:
    """Run at TP 2, stopped after step 6, with checkpoints saved asynchronously."""
    overrides = ("parallel.tp=2", "checkpoint.asynchronous=true")
    return place.run("stopped", *overrides, processes=2, fate="TERM:6")


def copied(place: Place, run: Run, name: str) -> Run:
    place.back_at(run, run.tracked, name)
    return Run(place.folder / name, [], "")


def last_of(run: Run) -> Path:
    return run.folder / f"iter_{run.tracked:07d}"


def refused(run: Run) -> str:
    assert 2 in run.codes, run.said
    assert "Traceback" not in run.said
    return run.said[run.said.index("olmo-bridge: ") :]


def test_every_file_is_recorded(stopped: Run) -> None:
    for folder in (stopped.folder / name for name in stopped.saved):
        files = json.loads((folder / RECORD).read_text())["files"]
        there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        assert files.keys() == there.keys() - {RECORD}
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= files.keys()
        digests = subprocess.run(
            ["sha256sum", *files], cwd=folder, capture_output=True, text=True, check=True
        )
        assert [f"{f['sha256']}  {name}" for name, f in files.items()] == (
            digests.stdout.splitlines()
        )
        assert olmo_bridge("verify", folder, "--json").exit_code == 0


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_flipped_byte_is_detected(place: Place, stopped: Run, count: int) -> None:
    folder = last_of(copied(place, stopped, f"flipped-{count}"))
    assert f"{count} of {count} found" in run_script("flipped_bytes", folder, count)


@pytest.mark.slow
def test_the_message_has_a_command_that_resumes(place: Place, whole: Run) -> None:
    """After the command in the message has run, the run equals an undamaged one."""
    place.run("a run", fate="TERM:6")
    run = Run(place.folder / "a run", [], "")
    assert run.saved == ["iter_0000004", "iter_0000006"]
    flip(last_of(run) / "__0_1.distcp", 5000)
    before = tree_hash(run.folder)

    message = refused(place.run("a run"))

    assert f"{last_of(run)}: damaged since it was written" in message
    assert "__0_1.distcp has other bytes than were written" in message
    assert "To resume from the checkpoint before it, that of step 4" in message
    assert tree_hash(run.folder) == before
    subprocess.run(message.splitlines()[-1], shell=True, check=True)
    again = place.run("a run").done()
    assert again.curve == whole.curve
    assert [event["step"] for event in again.events("resumed")] == [4]


@pytest.mark.slow
def test_several_processes_divide_the_files_to_check(place: Place, stopped: Run) -> None:
    run = copied(place, stopped, "several")
    for name in ("__0_0.distcp", "__1_1.distcp", ".metadata"):
        flip(last_of(run) / name, 100)
    (last_of(run) / "common.pt").unlink()
    with (last_of(run) / "run_config.yaml").open("a") as file:
        file.write("\n")

    message = refused(place.run("several", "parallel.tp=2", processes=2))

    for line in (
        "__0_0.distcp has other bytes than were written",
        "__1_1.distcp has other bytes than were written",
        ".metadata has other bytes than were written",
        "common.pt is not there",
        "run_config.yaml has ",
    ):
        assert line in message


@pytest.mark.slow
def test_a_damaged_first_checkpoint_has_no_alternative(place: Place, whole: Run) -> None:
    place.back_at(whole, 4, "first")
    flip(place.folder / "first/iter_0000004/.metadata", 100)
    message = refused(place.run("first"))
    assert "There is no checkpoint before it" in message


@pytest.mark.parametrize("more", [(), ("init.optimizer=true",)], ids=["weights", "optimizer"])
def test_weights_of_a_damaged_run_are_refused(
    place: Place, whole: Run, more: tuple[str, ...]
) -> None:
    damaged = copied(place, whole, "-".join(["damaged", *more]))
    flip(last_of(damaged) / "__0_0.distcp", 9000)
    run = place.run("from-damaged", f"init.checkpoint={damaged.folder}", *more)
    assert "__0_0.distcp has other bytes than were written" in refused(run)
    assert not run.folder.exists()


@pytest.mark.slow
def test_a_checkpoint_without_checksums_is_resumed_with_a_warning(place: Place, whole: Run) -> None:
    place.back_at(whole, 8, "unrecorded")
    folder = place.folder / "unrecorded/iter_0000008"
    (folder / RECORD).unlink()

    run = place.run("unrecorded").done()

    assert f">> {folder}: has no checksums, so damaged bytes in it" in run.said
    assert run.curve == whole.curve


def test_verify_finds_the_damage_too(place: Place, whole: Run) -> None:
    run = copied(place, whole, "verified")
    assert olmo_bridge("verify", run.folder).exit_code == 0
    damaged = sorted(last_of(run).glob("__0_*.distcp"))[-1]
    flip(damaged, 7000)
    verified = olmo_bridge("verify", run.folder)
    assert verified.exit_code == 1
    assert damaged.name in verified.output
