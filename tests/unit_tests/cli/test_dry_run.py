"""What ``train --dry-run`` shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_tokenizer import make_tokenizer
from typer.testing import CliRunner

from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.cli.dry_run import dry_run_result, print_dry_run, shown_settings
from megatron_olmo_bridge.data.options import PrepareOptions
from megatron_olmo_bridge.data.prepare import prepare_data
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import (
    OptimizerConfig,
    ParallelConfig,
    StepsConfig,
    TrainingConfig,
)
from megatron_olmo_bridge.training.estimate import Estimate, estimate
from megatron_olmo_bridge.training.folder import claim
from megatron_olmo_bridge.training.recipes import apply_overrides, load_recipe
from megatron_olmo_bridge.training.resolve import ResolvedRun, bridge_of, resolve


@pytest.fixture
def config() -> TrainingConfig:
    return TrainingConfig(
        name="seven",
        model=dict(published_sizes()["olmo2-7b"].sizes["olmo2-7b"]),
        provider={"init_method_std": 0.02},
        train=StepsConfig(steps=1000, global_batch_size=1024),
        optimizer=OptimizerConfig(lr=4e-4),
        parallel=ParallelConfig(tp=2, pp=2),
        sources={
            "model": "some/where: config.json",
            "optimizer.lr": "a/file.yaml: optimizer.learning_rate",
            "optimizer.beta2": "a/file.yaml: betas",
            "parallel": "ours: it fits",
        },
    )


def estimated(config: TrainingConfig) -> tuple[ResolvedRun, Estimate]:
    resolved = resolve(config, None, processes=8)
    return resolved, estimate(config, resolved.bridge, resolved.layout)


def test_only_changed_and_cited_settings_are_shown(config: TrainingConfig) -> None:
    assert dict(shown_settings(config, bridge_of(config))) == {
        "model": "olmo2-7b",
        "provider.init_method_std": 0.02,
        "train.steps": 1000,
        "train.global_batch_size": 1024,
        "optimizer.lr": 4e-4,
        "optimizer.beta2": 0.95,
        "parallel.tp": 2,
        "parallel.pp": 2,
    }


def test_a_model_without_a_name_is_shown_by_its_family(config: TrainingConfig) -> None:
    config.model["num_hidden_layers"] = 8
    assert dict(shown_settings(config, bridge_of(config)))["model"] == "olmo2"


def test_the_dry_run_prints_tables(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    print_dry_run(*estimated(config))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "seven: 32 layers, 4096 wide, 32 heads, vocabulary of 100352",
        "model olmo2-7b [1] config.json",
        "optimizer.lr 0.0004 [2] optimizer.learning_rate",
        "optimizer.beta2 0.95 [2] betas",
        "parallel.tp 2 [3]",
        "[2] a/file.yaml",
        "[3] ours: it fits",
        "parameters 7,298,617,344 (7.30B) 6,887,575,552 without embeddings",
        "step 4.19M tokens 1024 sequences: 2 data-parallel ranks x 512 micro-batches x 1",
        "run 4.19B tokens 1,000 steps, 1,024,000 sequences",
        "Memory of each of 8 processes, estimated:",
        "stage layers parameters weights gradients optimizer activations logits total",
    ):
        assert line in lines
    assert any(line.startswith("0 16 1.82B 3.65 GB 7.30 GB 10.95 GB") for line in lines)


def test_the_saved_checkpoints_are_listed(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its memory is shown too, and without a folder nothing is saved."""
    print_dry_run(*estimated(config))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "on the way 14.60 GB can be resumed at another data-parallel size" in lines
    assert "the last step 54.74 GB can be resumed at any layout" in lines
    lost = "No checkpoint, log or report will be saved, and the trained weights will be lost: "
    assert lines[-1] == f"{lost}set checkpoint.save=FOLDER"

    config.export.hf = "exports"
    print_dry_run(*estimated(config))
    assert "report will be saved: set checkpoint.save=FOLDER" in capsys.readouterr().out

    config.checkpoint.save = "runs/seven"
    print_dry_run(*estimated(config))
    assert "will be saved" not in capsys.readouterr().out


def test_tables_fit_into_a_narrow_terminal(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    print_dry_run(*estimated(config))
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 120


def test_the_dry_run_as_json(config: TrainingConfig) -> None:
    found = estimated(config)[1]
    result = dry_run_result(config, found)
    assert result["config"]["optimizer"]["beta1"] == 0.9
    assert result["estimate"]["parameters"] == 7_298_617_344
    assert [s["total"] for s in result["estimate"]["stages"]] == [s.total for s in found.stages]
    assert result["estimate"]["worst"] == found.worst.stage == 0


def test_a_checkpoint_folder_gets_the_end_token_of_the_data(tmp_path: Path) -> None:
    """The run itself goes on there; and more steps are refused as the run refuses them."""
    pytest.importorskip("megatron.core")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a river and a bridge " * 200}) + "\n")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    data = prepare_data([texts], tmp_path / "data", PrepareOptions(tokenizer=tokenizer, workers=1))
    words = [
        f"data.path={data.prefix}",
        f"checkpoint.save={tmp_path / 'run'}",
        "train.sequence_length=32",
    ]
    config = apply_overrides(load_recipe("olmo2_tiny"), words)
    claim(replace(config, model=config.model | {"eos_token_id": data.eos_id}))

    command = ["train", "olmo2_tiny", *words, "--dry-run"]
    same = CliRunner().invoke(app, command)
    more = CliRunner().invoke(app, [*command, f"train.steps={config.train.steps + 1}"])

    assert same.exit_code == 0, same.output
    assert more.exit_code == 2
    assert f"extends a run of {config.train.steps} steps" in more.output
