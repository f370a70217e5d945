"""Go from text to a trained model in transformers with ``examples/train`` and the public commands.

``make train-demo`` trains the same model for longer."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ended, olmo_bridge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS, BELOW = 80, 3.5
"""Loss in nats per token after ``steps`` steps. Random weights have 6.9, unigrams 4.7."""
OVERRIDES = [
    "olmo2_tiny",
    f"train.steps={STEPS}",
    "train.sequence_length=64",
    "train.micro_batch_size=16",
    "optimizer.lr=3e-3",
    "schedule.warmup_steps=10",
    "data.path=data/train",
    "data.validation=data/held-out",
    "evaluation.interval=40",
    "checkpoint.save=run",
    "checkpoint.interval=20",
    "parallel.tp=2",
]


def script(name: str, *arguments: object) -> None:
    """Run a script of the repository in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / name), run_name="__main__")


def command(*arguments: object) -> str:
    done = olmo_bridge(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def log() -> list[dict[str, float | str]]:
    path = Path("run/log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stopped_after(step: int) -> tuple[int, str]:
    """Train in separate processes and ask them to stop; return the exit code and their output."""
    start = [sys.executable, "-m", "megatron_olmo_bridge", "train", *OVERRIDES, "--processes", "2"]
    with subprocess.Popen(
        start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as training:
        while not any(line["event"] == "step" and line["step"] >= step for line in log()):
            assert training.poll() is None, training.communicate()
            time.sleep(0.1)
        training.send_signal(signal.SIGTERM)
        said, _ = training.communicate()
    return training.returncode, said


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all steps ran, as a new user would run them."""
    folder = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script("recipes/text/make_text.py", "text", "--megabytes", 0.5)
        script(
            "recipes/text/train_tokenizer.py", "tokenizer", "text/train-1.jsonl", "text/train-3.txt"
        )
        parts = ["text/train-1.jsonl", "text/train-2.jsonl.gz", "text/train-3.txt"]
        command("prepare-data", *parts, "data/train", "--tokenizer", "tokenizer", "--workers", 2)
        command(
            "prepare-data",
            "text/held-out.jsonl",
            "data/held-out",
            "--tokenizer",
            "tokenizer",
            "--workers",
            1,
        )
        # After the first checkpoint, so that megatron-core's helper processes must survive the
        # signal.
        code, said = stopped_after(30)
        assert code == 75, said
        codes, said = ended("training_runs", "lives", *OVERRIDES, processes=2)
        assert codes == [0, 0], said
        command("export", "run", "hf")
    return folder


@pytest.fixture(autouse=True)
def in_its_folder(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loop)


def test_a_stopped_run_resumes_at_the_same_step() -> None:
    events = [line for line in log() if line["event"] in ("stopped", "resumed", "done")]
    assert [line["event"] for line in events] == ["stopped", "resumed", "done"]
    stopped, resumed, done = (line["step"] for line in events)
    assert 30 <= stopped == resumed < done == STEPS
    steps = [line["step"] for line in log() if line["event"] == "step"]
    assert steps == sorted({1, stopped, *range(10, STEPS + 1, 10)})


def test_transformers_computes_the_same_low_loss(capsys: pytest.CaptureFixture[str]) -> None:
    script("examples/train/evaluate.py", "run", "hf", "--below", BELOW)

    said = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r" (\d+\.\d{6}) ", said)]
    uniform, unigrams, trainer, exported = losses
    assert exported == pytest.approx(trainer, abs=1e-4)
    assert exported < BELOW < unigrams < uniform == pytest.approx(6.931472)


def test_the_comparison_detects_other_weights(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="The loss is not below"):
        script("examples/train/evaluate.py", "run", "hf", "--below", 0.5)
    command("export", "run", tmp_path / "earlier", "--iteration", 20)
    with pytest.raises(SystemExit, match="differ by"):
        script("examples/train/evaluate.py", "run", tmp_path / "earlier")


def test_the_export_has_the_trained_weights() -> None:
    assert command("verify", "run", "hf").startswith("Equal: 47 tensors")


def test_it_generates_text_and_stops_at_eos() -> None:
    printed = command("generate", "run", "--prompt", "Once upon a time", "--json")
    said = json.loads(printed)["result"]
    assert said["tokens"] and " " in said["text"]
    assert json.loads(Path("hf/config.json").read_text())["eos_token_id"] == 0


def test_the_report_can_be_rebuilt_from_the_log() -> None:
    assert json.loads(command("report", "run", "--json"))["result"]["step"] == STEPS
    assert Path("run/report.html").stat().st_size > 10_000
