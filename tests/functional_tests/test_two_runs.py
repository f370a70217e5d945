"""Two runs in one folder: one runs as if alone, the other is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from launching import olmo_bridge, run_script
from slow import slow_but
from training_runs import Place, Run
from trees import tree_hash

from megatron_olmo_bridge.training import run_lock

SCREEN = 24
"""Maximum number of lines of a message."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(place: Place) -> Run:
    return place.run("alone", f"export.hf={place.folder}/alone-exports").done()


def both(place: Place, logs: Path, *overrides: str) -> dict[int, tuple[int, str]]:
    """Start two runs at once; return the exit code and output of each by process id."""
    logs.mkdir()
    out = run_script("two_runs", logs, "lives", place.folder / "olmo2.py", *overrides)
    codes: list[tuple[int, int]] = json.loads(out.splitlines()[-1])
    return {run: (code, (logs / str(n)).read_text()) for n, (run, code) in enumerate(codes)}


def refusal(ended: dict[int, tuple[int, str]]) -> str:
    """Return the message of the refused run, after checking that the other one finished."""
    (winner, _), (_, (_, said)) = sorted(ended.items(), key=lambda run: run[1][0])
    assert [code for code, _ in sorted(ended.values())] == [0, 2], ended
    assert "Traceback" not in said
    message = said[said.index("olmo-bridge: ") :]
    assert len(message.splitlines()) <= SCREEN
    assert f"process {winner}," in message
    return message


@pytest.mark.parametrize("attempt", slow_but([0], range(20)))
def test_two_starts_at_once(place: Place, alone: Run, tmp_path: Path, attempt: int) -> None:
    """The folder is new in even attempts, and that of a stopped run in odd ones."""
    name, more = f"both-{attempt}", (f"export.hf={tmp_path}/exports",)
    if attempt % 2:
        place.run(name, *more, fate="TERM:6")
    save = f"checkpoint.save={place.folder / name}"

    message = refusal(both(place, tmp_path / "logs", save, *more))

    assert "export.hf=" in message or "checkpoint.save=" in message
    run = Run(place.folder / name, [], "")
    assert run.curve == alone.curve
    assert run.evaluations == alone.evaluations
    assert not (run.folder / run_lock.LOCK).exists()


@pytest.mark.slow
def test_two_runs_that_export_into_one_folder(place: Place, tmp_path: Path) -> None:
    """They save no checkpoints, but their exports have the same names."""
    exports = f"export.hf={tmp_path}/exports"
    message = refusal(both(place, tmp_path / "logs", "checkpoint.save=null", exports))
    assert message.startswith(f"olmo-bridge: {exports}: another run is at work there (host ")
    assert (tmp_path / "exports" / "step_14" / "config.json").exists()


def test_read_only_commands_need_no_lock(
    place: Place, alone: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run, an export and a report leave an active run unchanged."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a read-only command took a lock")

    monkeypatch.setattr(run_lock, "_take", refuse)
    before = tree_hash(alone.folder)
    save = f"checkpoint.save={alone.folder}"
    exports = f"export.hf={place.folder}/alone-exports"
    looked = olmo_bridge("train", place.folder / "olmo2.py", save, exports, "--dry-run")
    assert looked.exit_code == 0, looked.output
    assert olmo_bridge("export", alone.folder, tmp_path / "hf").exit_code == 0
    assert tree_hash(alone.folder) == before
