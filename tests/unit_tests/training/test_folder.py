"""A run's folder: new, its own, or refused; nothing is written before everything else is sound."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("omegaconf")

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, OutputError
from megatron_olmo_bridge.training.config import StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.folder import RUN_FILE, check_folders, claim
from megatron_olmo_bridge.training.recipes import apply_overrides, as_dict, from_dict

NOBODY = 65534


def run(folder: Path | None, *overrides: str) -> TrainingConfig:
    config = TrainingConfig(model={"vocab_size": 100}, train=StepsConfig(steps=5))
    config.checkpoint.save = str(folder) if folder else None
    return apply_overrides(config, overrides)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of a run that has started."""
    claim(run(tmp_path / "run"))
    return tmp_path / "run"


def test_exports_of_another_run_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    (exports / "step_10").mkdir(parents=True)
    for other in (run(None), run(tmp_path / "new"), run(folder)):
        other.export.hf = str(exports)
        with pytest.raises(InputError, match=r"has exports of another run \(step_10\)"):
            check_folders(other)
    (exports / "step_10").rmdir()
    claim(run(folder, f"export.hf={exports}"))
    (exports / "step_10").mkdir()
    check_folders(run(folder, f"export.hf={exports}/../exports"))  # its own


def test_a_run_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_folders(run(None))
    claim(run(None))
    assert not list(tmp_path.iterdir())


def test_a_new_folder_is_looked_at_and_then_claimed(tmp_path: Path) -> None:
    config = run(tmp_path / "a" / "b", "data.path=x")
    check_folders(config)
    assert not list(tmp_path.iterdir())
    claim(config)
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [RUN_FILE]
    found = yaml.safe_load((tmp_path / "a" / "b" / RUN_FILE).read_text())
    assert found == as_dict(config)
    assert from_dict(found) == config


@pytest.mark.parametrize(
    "override",
    [
        "parallel.tp=2",
        "checkpoint.interval=5",
        "evaluation.batches=3",
        "logging.interval=1",
        "export.hf=/tmp/exports",
        "train.micro_batch_size=2",
        "data.workers=2",
        "data.cache=/tmp",
        "data.tokenizer=here",
        "name=other",
    ],
)
def test_a_run_may_go_on_with_other(folder: Path, override: str) -> None:
    check_folders(run(folder, override))


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("train.steps=4", "train.steps: was 5, is 4"),
        ("schedule.end_step=7", "schedule.end_step: was None, is 7"),
        ("train.seed=1", "train.seed: was 1234, is 1"),
        ("optimizer.lr=1", "optimizer.lr: was 0.0003, is 1.0"),
        ("model.vocab_size=101", "model.vocab_size: was 100, is 101"),
        ("provider.hidden_dropout=0.1", "provider.hidden_dropout: was None, is 0.1"),
        ("data.path=[a,b]", r"data.path: was \[\], is \['a', 'b'\]"),
        ("init.hf=hf", "init.hf: was None, is hf"),
        ("classification.patience=1", "classification.patience: was None, is 1"),
    ],
)
def test_but_not_of_another_kind(folder: Path, override: str, differs: str) -> None:
    before = (folder / RUN_FILE).read_bytes()
    with pytest.raises(
        InputError, match=rf"another run; .*\n(.*\n)*  {differs}\n(.*\n)*Name another"
    ):
        check_folders(run(folder, override))
    assert (folder / RUN_FILE).read_bytes() == before


def test_a_run_that_is_older_than_a_field_goes_on_at_its_default(folder: Path) -> None:
    recorded = yaml.safe_load((folder / RUN_FILE).read_text())
    del recorded["stability"], recorded["optimizer"]["z_loss"]
    (folder / RUN_FILE).write_text(yaml.safe_dump(recorded))
    check_folders(run(folder))
    with pytest.raises(InputError, match=r"optimizer.z_loss: was 0.0, is 0.1"):
        check_folders(run(folder, "optimizer.z_loss=0.1"))


def test_a_run_may_be_extended(folder: Path) -> None:
    """More steps are allowed if the config says what happens to the learning rate."""
    more = "train.steps=9"
    with pytest.raises(InputError, match=r"extends a run of 5 steps(.|\n)*\n  .*end_step=5: as"):
        check_folders(run(folder, more))
    with pytest.raises(InputError, match=r"differs in\n(.*\n)*  train.seed: was 1234, is 1\n"):
        check_folders(run(folder, more, "schedule.end_step=9", "train.seed=1"))

    for end in (5, 9):
        extended = run(folder, more, f"schedule.end_step={end}")
        extension = check_folders(extended)
        assert extension is not None and extension.planned_steps == 5

    claim(extended)
    assert check_folders(extended) is None
    with pytest.raises(InputError, match=r"train\.steps: was 9, is 5"):
        check_folders(run(folder))


def test_many_differences_are_counted(folder: Path) -> None:
    names = ("lr", "beta1", "beta2", "eps", "weight_decay", "clip_grad", "z_loss")
    overrides = [f"optimizer.{name}=0.123" for name in names]
    with pytest.raises(InputError, match="  and 2 more\n"):
        check_folders(run(folder, *overrides, "train.steps=9", "train.seed=9", "data.path=x"))


@pytest.mark.parametrize("name", ["iter_0000003/x", "latest_checkpointed_iteration.txt"])
def test_checkpoints_that_somebody_else_saved(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="no run of this command saved"):
        check_folders(run(tmp_path))


def test_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="is a Hugging Face checkpoint"):
        check_folders(run(tmp_path))


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "slurm-17.out").touch()
    check_folders(run(tmp_path))


@pytest.mark.parametrize("text", ["", "a: [", "- a", "7"])
def test_a_damaged_record(folder: Path, text: str) -> None:
    (folder / RUN_FILE).write_text(text)
    with pytest.raises(FormatError, match=r"run\.yaml: damaged"):
        check_folders(run(folder))


@pytest.mark.parametrize("field", ["checkpoint.save", "export.hf"])
@pytest.mark.parametrize("source", ["", "/iter_0000003", "/../run"])
@pytest.mark.parametrize("init", ["init.hf", "init.checkpoint"])
def test_what_goes_in_is_not_where_it_comes_out(
    tmp_path: Path, field: str, source: str, init: str
) -> None:
    given = f"{tmp_path}/run{source}"
    with pytest.raises(InputError, match=f"{init}={given} is in {field}={tmp_path}/run"):
        check_folders(run(None, f"{field}={tmp_path}/run", f"{init}={given}"))


def test_beside_each_other_they_are_welcome(tmp_path: Path) -> None:
    check_folders(run(tmp_path / "run2", f"init.checkpoint={tmp_path}/run"))


@pytest.mark.parametrize("below", ["", "/x", "/x/y"])
@pytest.mark.parametrize("field", ["checkpoint.save", "export.hf"])
def test_a_file_is_no_folder(tmp_path: Path, field: str, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"{field}={tmp_path}/file{below}: .*file is a file"):
        check_folders(run(None, f"{field}={tmp_path}/file{below}"))


def test_no_permission() -> None:
    if os.geteuid() != 0:
        pytest.skip("another user can only be had as root")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # others can reach that one
        Path(name).chmod(0o755)
        config = run(Path(name) / "run")
        assert said_to_nobody(config) == (
            f"checkpoint.save={name}/run: no permission to write into {name}"
        )


def said_to_nobody(config: TrainingConfig) -> str:
    """What a user without rights is told."""
    out, into = os.pipe()
    if os.fork() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            check_folders(config)
        except BridgeError as error:
            os.write(into, str(error).encode())
        os._exit(0)
    os.close(into)
    with open(out) as pipe:  # noqa: PTH123
        said = pipe.read()
    os.wait()
    return said
