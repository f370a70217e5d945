"""A run that was killed, stopped or moved to another layout resumes exactly."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("megatron.core")

from killing import wait_until
from slow import slow_but
from training_runs import Place, Run, apart
from trees import tree_hash

LAYOUTS = {"one": (), "tp": ("parallel.tp=2",), "pp": ("parallel.pp=2",), "dp": ()}
PROCESSES = {"one": 1, "tp": 2, "pp": 2, "dp": 2}
PLAIN_OPTIMIZER = "parallel.distributed_optimizer=false"
BF16 = "train.precision=bfloat16"
FOR_ANY_LAYOUT = "checkpoint.fully_reshardable=all"
DROPOUT = ("provider.hidden_dropout=0.1", "provider.attention_dropout=0.1")
Uninterrupted = Callable[..., Run]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def uninterrupted(place: Place) -> Uninterrupted:
    """Return a function that trains an uninterrupted run at a layout, once. Its checkpoints are for
    any layout; those of the runs compared with it are for one layout, the default."""
    made: dict[tuple[str, ...], Run] = {}

    def run(layout: str, *overrides: str, recipe: str = "olmo2") -> Run:
        key = (layout, recipe, *overrides)
        if key not in made:
            name, overrides = "-".join(key), (*overrides, FOR_ANY_LAYOUT)
            made[key] = train(place, name, layout, *overrides, recipe=recipe).done()
        return made[key]

    return run


def train(
    place: Place,
    name: str,
    layout: str,
    *overrides: str,
    fate: str = "lives",
    recipe: str = "olmo2",
) -> Run:
    overrides = (*LAYOUTS[layout], *overrides)
    return place.run(name, *overrides, processes=PROCESSES[layout], fate=fate, recipe=recipe)


def assert_same(run: Run, whole: Run) -> None:
    """Check that two runs have the same numbers bit for bit."""
    assert run.curve == whole.curve
    assert len(run.curve) == whole.log[0]["steps"]
    assert run.evaluations == whole.evaluations


# ------------------------------------------------------------------------------------ kill it


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp"])
def test_killed_at_random_moments_and_while_saving(
    place: Place, uninterrupted: Uninterrupted, layout: str
) -> None:
    """The run gets SIGKILL at five random moments in steps, evaluations or saves, then before a
    checkpoint gets its name, and before the tracker names it."""
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


@pytest.mark.slow
@pytest.mark.parametrize("chain", range(10))
def test_killed_ten_times(place: Place, uninterrupted: Uninterrupted, chain: int) -> None:
    """The kills come in a save, at random steps, or at random changes of the run's folder. A run
    that finishes in between is compared too, and another one started."""
    fates = random.Random(f"chain {chain}")
    runs, kills = [f"chain-{chain}"], 0
    while kills < 10:
        fate = (
            "saving:1"
            if kills == 4
            else fates.choice([f"event:{fates.randint(1, 60)}", f"killed:{fates.randint(1, 13)}:0"])
        )
        run = train(place, runs[-1], "one", fate=fate)
        if run.codes == [0]:
            runs.append(f"chain-{chain}-{len(runs)}")
        else:
            assert run.codes == [-signal.SIGKILL], run.said[-3000:]
            kills += 1

    for name in runs:
        assert_same(train(place, name, "one").done(), uninterrupted("one"))


# ------------------------------------------------------------------------------------ stop it


@pytest.mark.parametrize(
    ("layout", "number"), slow_but([("tp", "TERM")], [("one", "INT"), ("tp", "TERM")])
)
def test_stopped_by_a_signal(
    place: Place, uninterrupted: Uninterrupted, layout: str, number: str
) -> None:
    """Any one of the processes may get the signal. The current step is finished and saved."""
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
    """With ``--processes 2``, the terminal sends SIGINT to all processes at once."""
    folder = place.folder / "command"
    command = [
        sys.executable,
        "-m",
        "megatron_olmo_bridge",
        "train",
        f"{place.folder}/olmo2.py",
        "--processes",
        "2",
        f"checkpoint.save={folder}",
        "parallel.tp=2",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    run = Run(folder, [], "")
    wait_until(lambda: ((folder / "log.jsonl").exists() and len(run.log) > 3) or process.poll())
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate()

    assert process.returncode == 75, errors
    assert errors.count("asked to stop") == 1
    assert "Traceback" not in errors
    assert run.tracked == max(run.curve) < 14
    assert f"checkpoint at step {run.tracked}" in said
    assert_same(train(place, folder.name, "tp").done(), uninterrupted("tp"))


# --------------------------------------------------------------------- random numbers, precision


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp"])
def test_dropout_resumes_its_random_numbers(
    place: Place, uninterrupted: Uninterrupted, layout: str
) -> None:
    whole = uninterrupted(layout, *DROPOUT, recipe="gpt2")
    train(place, f"dropout-{layout}", layout, *DROPOUT, fate="TERM:5", recipe="gpt2")

    assert_same(train(place, f"dropout-{layout}", layout, *DROPOUT, recipe="gpt2").done(), whole)


@pytest.mark.slow
def test_dropout_drops(uninterrupted: Uninterrupted) -> None:
    without = uninterrupted("one", recipe="gpt2")
    assert apart(without.curve, uninterrupted("one", *DROPOUT, recipe="gpt2").curve)[0] > 1e-3


@pytest.mark.slow
def test_bf16_resumes_exactly(place: Place, uninterrupted: Uninterrupted) -> None:
    """The optimizer's float32 weights are saved too."""
    train(place, "bf16", "tp", BF16, fate="TERM:5")

    assert_same(train(place, "bf16", "tp", BF16).done(), uninterrupted("tp", BF16))


# -------------------------------------------------------------------------------- another layout


OTHER_LAYOUTS = [
    ("tp", "pp", ()),
    ("pp", "tp", ()),
    ("tp", "dp", ()),
    ("tp", "pp", (PLAIN_OPTIMIZER,)),
    ("tp", "pp", (BF16,)),
]


@pytest.mark.parametrize(
    ("before", "after", "overrides"), slow_but(OTHER_LAYOUTS[:1], OTHER_LAYOUTS)
)
def test_a_run_resumes_at_another_layout(
    place: Place,
    uninterrupted: Uninterrupted,
    before: str,
    after: str,
    overrides: tuple[str, ...],
) -> None:
    """The next ten steps have almost the same losses: measured 4e-7, in bfloat16 7e-4."""
    whole = uninterrupted(before, *overrides)
    name = "-".join([before, "to", after, *overrides])
    place.back_at(whole, 4, name)

    run = train(place, name, after, *overrides).done()

    assert run.events("resumed")[0]["step"] == 4
    assert list(run.curve) == list(range(1, 15))
    loss, norm = apart(run.curve, whole.curve)
    assert 0 < loss < (3e-3 if BF16 in overrides else 1e-4)
    assert norm < (0.1 if BF16 in overrides else 1e-3)


# ----------------------------------------- checkpoints that are for one layout, or for any


@pytest.fixture(scope="module")
def stopped(place: Place) -> Run:
    """Run at TP 2, stopped after step 5, with a default checkpoint (for one layout)."""
    return train(place, "stopped", "tp", fate="TERM:5")


def copied(place: Place, run: Run, name: str) -> str:
    place.back_at(run, run.tracked, name)
    return name


def test_another_model_parallel_layout_is_refused(place: Place, stopped: Run) -> None:
    """The message says what differs and what to do; nothing is changed."""
    name = copied(place, stopped, "refused")
    before = tree_hash(place.folder / name)

    run = train(place, name, "pp")

    assert 2 in run.codes
    assert "Traceback" not in run.said
    assert "  parallel.tp: was 2, is 1\n  parallel.pp: was 1, is 2\n" in run.said
    assert "at the saved layout with checkpoint.fully_reshardable=all" in run.said
    assert tree_hash(place.folder / name) == before


@pytest.mark.slow
def test_a_run_resumes_at_another_data_parallel_size(
    place: Place, uninterrupted: Uninterrupted, stopped: Run
) -> None:
    name = copied(place, stopped, "more")
    run = place.run(name, "parallel.tp=2", processes=4).done()
    assert apart(run.curve, uninterrupted("tp").curve)[0] < 1e-5


@pytest.mark.slow
def test_a_checkpoint_is_saved_again_for_any_layout(
    place: Place, uninterrupted: Uninterrupted, stopped: Run
) -> None:
    """Before the next step of the run, which it doesn't change."""
    name = copied(place, stopped, "again")
    killed = train(place, name, "tp", FOR_ANY_LAYOUT, fate="killed:6:0")
    assert set(killed.codes) == {-signal.SIGKILL}
    assert killed.saved == ["iter_0000004", "iter_0000005"]
    assert_same(train(place, copied(place, killed, "same"), "tp").done(), uninterrupted("tp"))

    run = train(place, name, "pp").done()

    assert apart(run.curve, uninterrupted("tp").curve)[0] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fate", "saved"),
    [
        ("replaced:1", ["iter_0000005", "iter_0000005.partial"]),
        ("replacing:1", ["iter_0000005.partial", "iter_0000005.replaced.partial"]),
    ],
)
def test_killed_while_a_checkpoint_takes_the_place_of_another(
    place: Place, uninterrupted: Uninterrupted, stopped: Run, fate: str, saved: list[str]
) -> None:
    """If the system can exchange two names, the name always has a checkpoint; else the older is
    restored."""
    name = copied(place, stopped, fate)
    killed = train(place, name, "tp", FOR_ANY_LAYOUT, fate=fate)
    assert killed.saved[1:] == saved

    run = train(place, name, "tp").done()

    assert run.saved == [f"iter_{step:07d}" for step in (4, 5, 8, 12, 14)]
    assert_same(run, uninterrupted("tp"))


# ---------------------------------------------------------------------------------- more steps


@pytest.mark.slow
def test_an_extended_run_equals_one_that_had_all_steps(place: Place) -> None:
    """With a constant learning rate and data for all steps, they are equal bit for bit."""
    constant = ("schedule.decay=constant",)
    whole = place.run("constant", *constant).done()
    place.run("extended", *constant, "train.steps=8").done()

    run = place.run("extended", *constant, "train.steps=14").done()

    assert run.curve == whole.curve
    assert run.events("extended")[0]["message"].startswith("from 8 to 14 steps; the learning rate")
    assert run.events("resumed")[0]["steps"] == 14


@pytest.mark.slow
def test_the_learning_rate_of_an_extended_run_is_as_asked(
    place: Place, uninterrupted: Uninterrupted
) -> None:
    """The requested schedule applies from the next step; without a request the run is refused."""
    whole = {line["step"]: line["lr"] for line in uninterrupted("one").events("step")}
    short = place.run("short", "train.steps=8").done()
    place.back_at(short, 8, "planned")
    before = tree_hash(short.folder)
    refused = place.run("short", "train.steps=14")
    assert refused.codes == [2]
    assert "  schedule.end_step=14: as in a run of 14 steps" in refused.said
    assert tree_hash(short.folder) == before

    for name, end in (("short", 14), ("planned", 8)):
        run = place.run(name, "train.steps=14", f"schedule.end_step={end}").done()
        rates = {line["step"]: line["lr"] for line in run.events("step") if line["step"] > 8}
        planned = dict.fromkeys(range(9, 15), pytest.approx(3e-4))
        assert rates == (planned if end == 8 else {step: whole[step] for step in rates})
        assert len(rates) == 6
