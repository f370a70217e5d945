"""Fine-tune a classifier as a user does: make synthetic texts, train, compare in a table, serve."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from launching import olmo_bridge, run_script
from slow import slow_but

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/classification"
RECIPE = "complaints:tiny"
CLASSES, CHANCE, REACHED = 10, 0.1, 0.9
"""Classes of the data, accuracy of a random choice, and accuracy to reach (maximum 0.96)."""
LENGTH = 32
"""Sequence length in tokens; some texts are longer and are truncated."""


def example(script: str, *arguments: object) -> str:
    """Run a script of examples/classification; return what it printed."""
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with texts, a tiny OLMo-2 and a tiny ModernBERT."""
    folder = tmp_path_factory.mktemp("classification") / "data"
    example("make_synthetic.py", folder, "--classes", CLASSES)
    return folder


def overrides(data: Path, run: Path, *more: str) -> list[str]:
    return [
        f"init.hf={data}/olmo2-tiny",
        f"classification.train={data}/train.jsonl",
        f"classification.validation={data}/validation.jsonl",
        f"checkpoint.save={run}",
        f"train.sequence_length={LENGTH}",
        *more,
    ]


COMMAND = [sys.executable, "-m", "megatron_olmo_bridge", "train", RECIPE]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def train(*arguments: str) -> str:
    """Train in a separate process, because a run's global state stays in its process."""
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module", params=slow_but([], [1, 2]), ids=["tp1", "tp2"])
def run(request: pytest.FixtureRequest, data: Path) -> tuple[Path, str, int]:
    """Folder of a run, its output, and its tensor parallel size."""
    tp = request.param
    folder = data.parent / f"run-tp{tp}"
    more = [f"parallel.tp={tp}", "checkpoint.keep_last=null"]
    said = train(*overrides(data, folder, *more), "--processes", str(tp))
    baseline = ["--baseline", data / "modernbert-tiny"] if tp == 1 else []
    return folder, said + example("compare.py", folder, *baseline), tp


def results(folder: Path) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["models"]
    return models


def best(folder: Path) -> dict[str, Any]:
    evaluations = json.loads((folder / "evaluations.json").read_text())
    return max(evaluations, key=lambda e: e["score"])


def test_both_models_learn_and_are_compared_in_one_table(run: tuple[Path, str, int]) -> None:
    folder, said, tp = run
    models = results(folder)
    assert [m["name"] for m in models] == ["olmo2-tiny", "modernbert-tiny"][: 3 - tp]
    table = said[said.index("model ") :].splitlines()
    for model, line in zip(models, table[1:], strict=False):
        assert model["quality"]["accuracy"] >= REACHED > CHANCE
        assert model["speed"]["p95_ms"] >= model["speed"]["p50_ms"] > 0
        cells = line.split()
        assert cells[0] == model["name"]
        assert cells[2:6:2] == [f"{model['quality'][n]:.4f}" for n in ("accuracy", "macro_f1")]
        low, high = model["intervals"]["macro_f1"]
        assert low < model["quality"]["macro_f1"] < high
        assert len(model["misread"]) == round(500 * (1 - model["quality"]["accuracy"]))
    for report, other in ("report", "classification"), ("classification", "report"):
        assert f'<a href="{other}.html">' in (folder / f"{report}.html").read_text()
    assert "texts to train on, 1.6 times; 500 held out; 10 classes" in said


def test_a_dry_run_accepts_the_folder_of_its_own_run(
    run: tuple[Path, str, int], data: Path
) -> None:
    folder, _, tp = run
    more = (f"parallel.tp={tp}", "checkpoint.keep_last=null", "--dry-run")
    assert "parameters" in train(*overrides(data, folder, *more))


def test_transformers_measures_the_accuracy_of_training(run: tuple[Path, str, int]) -> None:
    folder, _, _ = run
    assert results(folder)[0]["quality"]["macro_f1"] == pytest.approx(best(folder)["score"])


def test_the_export_is_served_with_the_same_labels(
    run: tuple[Path, str, int], data: Path, tmp_path: Path
) -> None:
    """The expected labels come from the best iteration's Megatron checkpoint at the training
    layout."""
    from transformers import pipeline

    folder, _, tp = run
    checkpoint = folder / f"iter_{best(folder)['step']:07d}"
    held_out = data / "validation.jsonl"
    out = tmp_path / "labels.json"
    run_script("classification_labels", checkpoint, held_out, LENGTH, tp, out, processes=tp)
    found = json.loads(out.read_text())

    serve = pipeline("text-classification", model=str(folder / "classifier"))
    texts = [json.loads(line)["text"] for line in held_out.read_text().splitlines()]
    for batch_size in (1, 16):
        served = serve(texts, batch_size=batch_size, truncation=True)
        assert [answer["label"] for answer in served] == [f"topic {i}" for i in found]


def test_the_export_has_a_model_card(run: tuple[Path, str, int], data: Path) -> None:
    folder, _, _ = run
    config = json.loads((folder / "classifier/config.json").read_text())
    base = json.loads((data / "olmo2-tiny/config.json").read_text())
    assert config["architectures"] == ["Olmo2ForSequenceClassification"]
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {str(i): f"topic {i}" for i in range(CLASSES)}
    assert config["label2id"] == {f"topic {i}": i for i in range(CLASSES)}
    assert config["pad_token_id"] == base["pad_token_id"]
    tokenizer = json.loads((folder / "classifier/tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == LENGTH
    assert tokenizer.get("padding_side", "right") == "right"
    card = (folder / "classifier/README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "macro-F1" in card


@pytest.mark.slow
@pytest.mark.parametrize("run", [1], indirect=True)
def test_a_killed_and_resumed_run_gives_the_same_classifier(
    run: tuple[Path, str, int], data: Path, tmp_path: Path
) -> None:
    arguments = overrides(data, tmp_path / "run", "checkpoint.interval=20")
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "checkpoint at step 40" in line)
        process.kill()
    assert ">> resumed at step" in train(*arguments)
    for file in ("evaluations.json", "classifier/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (run[0] / file).read_bytes()


@pytest.mark.slow
def test_early_stopping_is_resumed_exactly(data: Path, tmp_path: Path) -> None:
    """With a learning rate of zero no evaluation improves on the previous one."""
    arguments = overrides(
        data,
        tmp_path / "run",
        "optimizer.lr=0",
        "evaluation.interval=2",
        "classification.patience=2",
        "schedule.warmup_steps=0",
    )
    said = train(*arguments)
    assert ">> checkpoint at step 4" in said and ">> evaluation at step 6" not in said
    assert ">> best: macro-F1" in said and "at step 0" in said
    again = train(*arguments)
    assert "resumed at step 4" in again and "evaluation at step 6" not in again
    assert again.count(">> best:") == 1


# -------------------------------------------------------------------------- other problem types

SCORES = {"multi_label_classification": "macro_f1", "regression": "r2"}


@pytest.fixture(scope="module", params=slow_but([], SCORES))
def other_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of another problem type, with its data in the same parent folder."""
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--problem-type", request.param, "--classes", 3]
    example("make_synthetic.py", folder, *options, "--examples", 2000, "--validation", 100)
    train(
        *overrides(folder, folder / "run", f"classification.problem_type={request.param}"),
        "classification.class_weights=none",
        "train.steps=150",
        "evaluation.interval=75",
        "checkpoint.interval=75",
    )
    example("compare.py", folder / "run", "--baseline", folder / "modernbert-tiny")
    return folder / "run"


def test_other_problem_types_are_learned_and_compared_with_a_baseline(other_run: Path) -> None:
    found = json.loads((other_run / "results.json").read_text())
    score = SCORES[found["problem_type"]]
    assert [m["name"] for m in found["models"]] == ["olmo2-tiny", "modernbert-tiny"]
    for model in found["models"]:
        low, high = model["intervals"][score]
        assert 0.6 < low < model["quality"][score] <= high <= 1
    evaluations = json.loads((other_run / "evaluations.json").read_text())
    kept = max(e["score"] for e in evaluations)
    assert found["models"][0]["quality"][score] == pytest.approx(kept, abs=1e-5)


def test_exports_of_other_problem_types_are_served_by_transformers(other_run: Path) -> None:
    from transformers import pipeline

    config = json.loads((other_run / "classifier/config.json").read_text())
    lines = (other_run.parent / "validation.jsonl").read_text().splitlines()[:20]
    texts = [json.loads(line)["text"] for line in lines]
    true = [json.loads(line)["label"] for line in lines]
    serve = pipeline("text-classification", model=str(other_run / "classifier"), top_k=None)
    served = serve(texts, truncation=True)
    if config["problem_type"] == "regression":
        assert config["id2label"] == {"0": "label"}
        errors = [
            abs(answer[0]["score"] - value) for answer, value in zip(served, true, strict=True)
        ]
        assert sum(errors) / len(errors) < 0.15
        return
    assert config["id2label"] == {"0": "topic 0", "1": "topic 1", "2": "topic 2"}
    labels = [{a["label"] for a in answer if a["score"] > 0.5} for answer in served]
    assert sum(found == set(value) for found, value in zip(labels, true, strict=True)) >= 14


def test_a_head_of_another_problem_type_is_refused(other_run: Path) -> None:
    data = other_run.parent
    problem_type = json.loads((other_run / "classifier/config.json").read_text())["problem_type"]
    other = next(kind for kind in SCORES if kind != problem_type)
    folder = data / "other"
    folder.mkdir(exist_ok=True)
    labels = ["1", "2"] if other == "regression" else [["a"], ["b"]]
    for name in ("train", "validation"):
        lines = [json.dumps({"text": "a text", "label": label}) for label in labels]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    message = refused(
        overrides(
            folder,
            data / "again",
            f"init.hf={other_run}/classifier",
            f"classification.problem_type={other}",
            "classification.class_weights=none",
        )
    )
    assert f"is a classifier of problem_type {problem_type}" in message


# -------------------------------------------------------------------------- complaints, fetched


def fetch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / "fetch_complaints.py"), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_complaints_are_fetched_and_split(tmp_path: Path) -> None:
    """The archive is like a published one: it has rows without a text and duplicate complaints."""
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["Date received", "Issue", "Consumer complaint narrative", "Company"])
    for i in range(400):
        text = ["", "The same letter.", f'They said "no",\nletter {i}'][min(i % 4, 2)]
        rows.writerow(["2024-01-01", f"issue {i % 10 % 7}", text, "A bank, Inc."])
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        archive.writestr("complaints.csv", table.getvalue())
    url = f"file://{tmp_path}/source.zip"

    for name in ("a", "b"):
        done = fetch(tmp_path / name, "--url", url, "--classes", "3", "--limit", "90")
        assert done.returncode == 0, done.stderr
    files = ("train.jsonl", "validation.jsonl")
    train, held_out = (read(tmp_path / "a" / name) for name in files)
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files
    )
    assert len(train) + len(held_out) == 90
    assert {e["label"] for e in train} == {e["label"] for e in held_out}
    assert len({e["label"] for e in train}) == 3
    texts = [e["text"] for e in train + held_out]
    assert len(set(texts)) == 90
    assert any(text.startswith('They said "no",\nletter') for text in texts)


def test_without_a_network_it_says_what_to_do(tmp_path: Path) -> None:
    done = fetch(tmp_path, "--url", "http://127.0.0.1:9/complaints.csv.zip")
    assert done.returncode == 1
    assert "can't be fetched" in done.stderr and "make_synthetic.py" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("beside", [None, "classifier"])
def test_a_folder_that_is_not_a_run_is_not_compared(tmp_path: Path, beside: str | None) -> None:
    (tmp_path / (beside or "")).mkdir(exist_ok=True)
    command = [sys.executable, str(EXAMPLE / "compare.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"compare.py: {tmp_path}: has no run.yaml and classifier/; name the run's folder\n"
    )


def changed(data: Path, tmp_path: Path, file: str, **values: object) -> str:
    """Copy the tiny OLMo-2 and change values in a JSON file; None deletes a value."""
    folder = tmp_path / "changed"
    shutil.copytree(data / "olmo2-tiny", folder)
    found = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return f"init.hf={folder}"


def refused(arguments: list[str]) -> str:
    """Return the message of a refused run, which must be all that it printed, before any process
    group."""
    done = olmo_bridge("train", RECIPE, *arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return done.stderr


def test_without_a_pad_token_it_says_what_to_do(data: Path, tmp_path: Path) -> None:
    change = changed(data, tmp_path, "config.json", pad_token_id=None)
    message = refused(overrides(data, tmp_path / "run", change))
    assert "no pad_token_id" in message and "provider.pad_token_id=ID" in message


def test_without_a_tokenizer_it_says_what_to_do(data: Path, tmp_path: Path) -> None:
    change = changed(data, tmp_path, "config.json")
    for file in (tmp_path / "changed").glob("tokenizer*"):
        file.unlink()
    assert "data.tokenizer" in refused(overrides(data, tmp_path / "run", change))


def test_another_models_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    other = f"data.tokenizer={data}/modernbert-tiny"
    change = changed(data, tmp_path, "config.json", pad_token_id=255)
    assert "no token 255" in refused(overrides(data, tmp_path / "run", change, other))


def test_a_line_that_is_not_json_is_named(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n{"text": "a",\n')
    message = refused(overrides(data, tmp_path / "run", f"classification.train={file}"))
    assert "broken.jsonl:2: not sound JSON" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classification.train=''", "classification.train is not set"),
        ("classification.text=body", "no 'body'; it has 'text', 'label'"),
        ("classification.problem_type=multi_label", "not one of regression, single_label"),
        ("classification.problem_type=regression", "not a number or a list of numbers"),
        ("classification.class_weights=equal", "neither none nor balanced"),
        ("checkpoint.save=null", "checkpoint.save is not set"),
        ("optimizer.z_loss=1e-4", "is for language models; set it to 0"),
        ("init.hf=null", "init.hf is not set"),
        ("init.checkpoint=run", "give either init.hf or init.checkpoint"),
        ("classification.labels=x", "Did you mean"),
    ],
)
def test_impossible_settings_are_refused(
    data: Path, tmp_path: Path, override: str, message: str
) -> None:
    assert message.lower() in refused(overrides(data, tmp_path / "run", override)).lower()


def test_a_classifier_with_other_classes_is_refused(
    run: tuple[Path, str, int], data: Path, tmp_path: Path
) -> None:
    folder, _, _ = run
    records = [{"text": "a", "label": label} for label in ("x", "y")]
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    files = [f"classification.{n}={file}" for n in ("train", "validation")]
    other = f"init.hf={folder}/classifier"
    message = refused(overrides(data, tmp_path / "run", other, *files))
    assert "is a classifier of other classes" in message
