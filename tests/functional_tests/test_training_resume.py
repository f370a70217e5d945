"""A run that is killed, stopped or moved to another layout goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

pytest.importorskip("megatron.core")

from training_runs import Place, Run, apart

LAYOUTS = {"one": (), "tp": ("parallel.tp=2",), "pp": ("parallel.pp=2",), "dp": ()}
PROCESSES = {"one": 1, "tp": 2, "pp": 2, "dp": 2}
PLAIN_OPTIMIZER = "parallel.distributed_optimizer=false"
BF16 = "train.precision=bfloat16"
DROPOUT = ("provider.hidden_dropout=0.1", "provider.attention_dropout=0.1")
Uninterrupted = Callable[..., Run]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def uninterrupted(place: Place) -> Uninterrupted:
    """A run at a layout that nothing happens to; made once."""
    made: dict[tuple[str, ...], Run] = {}

    def run(layout: str, *overrides: str, recipe: str = "olmo2") -> Run:
        key = (layout, recipe, *overrides)
        if key not in made:
            made[key] = train(place, "-".join(key), layout, *overrides, recipe=recipe).done()
        return made[key]

    return run


def train(
    place: Place, name: str, layout: str, *overrides: str, fate: str = "lives",
    recipe: str = "olmo2",
) -> Run:  # fmt: skip
    overrides = (*LAYOUTS[layout], *overrides)
    return place.run(name, *overrides, processes=PROCESSES[layout], fate=fate, recipe=recipe)


def assert_same(run: Run, whole: Run) -> None:
    """Every number is the same, to the last bit."""
    assert run.curve == whole.curve
    assert len(run.curve) == whole.log[0]["steps"]
    assert run.evaluations == whole.evaluations


# ------------------------------------------------------------------------------------ kill it


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.slow), "tp"])
def test_killed_at_random_moments_and_while_saving(
    place: Place, uninterrupted: Uninterrupted, layout: str
) -> None:
    """SIGKILL at five moments, in a step, in an evaluation or in a save, as it falls; then before a
    checkpoint has its name, and before the tracker names it."""
    moments = random.Random(f"moments {layout}")
    fates = [
        f"killed:{step}:{moments.uniform(0, 0.1)}"
        for step in sorted(moments.sample(range(1, 12), 5))
    ]
    for fate in [*fates, "saving:1", "tracking:1"]:
        killed = train(place, f"killed-{layout}", layout, fate=fate)
        assert set(killed.codes) == {-signal.SIGKILL}

    run = train(place, f"killed-{layout}", layout).done()

    assert_same(run, uninterrupted(layout))
    assert len(run.events("resumed")) >= 3


# ------------------------------------------------------------------------------------ stop it


@pytest.mark.parametrize(("layout", "number"), [("one", "INT"), ("tp", "TERM")])
def test_stopped_by_a_signal(
    place: Place, uninterrupted: Uninterrupted, layout: str, number: str
) -> None:
    """To any one of the processes. The step that it is in is the last, and is saved."""
    name = f"{number}-{layout}"
    stopped = train(place, name, layout, fate=f"{number}:6")
    assert 75 in stopped.codes
    assert stopped.tracked == max(stopped.curve) == 6
    assert stopped.events("stopped")[0]["step"] == 6
    assert "asked to stop" in stopped.said
    assert "Traceback" not in stopped.said

    run = train(place, name, layout).done()

    assert_same(run, uninterrupted(layout))


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_of_the_command(
    place: Place, uninterrupted: Uninterrupted
) -> None:
    """``--processes 2``. The terminal sends it to all of them at once."""
    folder = place.folder / "command"
    command = [
        sys.executable, "-m", "megatron_olmo_bridge", "train", f"{place.folder}/olmo2.py",
        "--processes", "2", f"checkpoint.save={folder}", "parallel.tp=2",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    run = Run(folder, [], "")
    until = time.monotonic() + 120
    while not ((folder / "log.jsonl").exists() and len(run.log) > 3):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)

    assert process.returncode == 75, errors
    assert errors.count("asked to stop") == 1
    assert "Traceback" not in errors
    assert run.tracked == max(run.curve) < 14
    assert f"checkpoint at step {run.tracked}" in said
    assert_same(train(place, folder.name, "tp").done(), uninterrupted("tp"))


# --------------------------------------------------------------------- random numbers, precision


@pytest.mark.parametrize("layout", ["one", pytest.param("tp", marks=pytest.mark.slow)])
def test_dropout_goes_on_with_its_random_numbers(
    place: Place, uninterrupted: Uninterrupted, layout: str
) -> None:
    whole = uninterrupted(layout, *DROPOUT, recipe="gpt2")
    train(place, f"dropout-{layout}", layout, *DROPOUT, fate="TERM:5", recipe="gpt2")

    assert_same(train(place, f"dropout-{layout}", layout, *DROPOUT, recipe="gpt2").done(), whole)


def test_dropout_drops(uninterrupted: Uninterrupted) -> None:
    without = uninterrupted("one", recipe="gpt2")
    assert apart(without.curve, uninterrupted("one", *DROPOUT, recipe="gpt2").curve)[0] > 1e-3


def test_bf16_resumes_exactly(place: Place, uninterrupted: Uninterrupted) -> None:
    """The weights that the optimizer keeps in float32 are saved too."""
    train(place, "bf16", "tp", BF16, fate="TERM:5")

    assert_same(train(place, "bf16", "tp", BF16).done(), uninterrupted("tp", BF16))


# -------------------------------------------------------------------------------- another layout


@pytest.mark.parametrize(
    ("before", "after", "overrides"),
    [
        ("tp", "pp", ()), ("pp", "tp", ()), ("tp", "dp", ()),
        ("tp", "pp", (PLAIN_OPTIMIZER,)), ("tp", "pp", (BF16,)),
    ],
)  # fmt: skip
def test_resumed_at_another_layout(
    place: Place, uninterrupted: Uninterrupted, before: str, after: str,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """The ten steps after it. Measured: 4e-7, and in bfloat16 7e-4."""
    whole = uninterrupted(before, *overrides)
    name = "-".join([before, "to", after, *overrides])
    place.back_at(whole, 4, name)

    run = train(place, name, after, *overrides).done()

    assert run.events("resumed")[0]["step"] == 4
    assert list(run.curve) == list(range(1, 15))
    loss, norm = apart(run.curve, whole.curve)
    assert 0 < loss < (3e-3 if BF16 in overrides else 1e-4)
    assert norm < (0.1 if BF16 in overrides else 1e-3)
