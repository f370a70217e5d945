"""Fixtures for the tests of live models, enabled by ``pytest_plugins = ["live_runs"]``.

Starting processes takes longer than all their work here. So one launch for each world size does the
work of all tests, and the tests then read the results.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from live_layouts import (
    BATCH,
    HALF_BATCH,
    LAYOUTS,
    MUTANTS,
    Step,
    hf_tensors,
    run_live,
    step,
    steps_of,
    train_steps,
)
from safetensors.torch import save_file
from transformers import Olmo2Config, Olmo2ForCausalLM

from megatron_olmo_bridge import synth


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return a folder of this session that all pytest-xdist workers share."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent
    (folder / "live").mkdir(exist_ok=True)
    return folder / "live"


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first worker to ask for it makes while the others wait."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_name(f"{folder.name}.done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by another worker that failed
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def models(shared: Path) -> Path:
    """Folders of Hugging Face models: ``plain`` (several files), ``tied``, ``half``, ``wide``."""
    return once(shared / "models", make_models)


def make_models(root: Path) -> None:
    plain = synth("olmo2-tiny", root / "plain", dtype="float32", max_shard_size="1MB")
    synth("olmo2-tiny", root / "half", dtype="bfloat16")

    tied = root / "tied"
    tied.mkdir()
    tensors = hf_tensors(plain)
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    # The two largest tensors, 64 MiB each, are adjacent in the file. The others have at most half
    # that size, but all tensors together are five times as large as the largest.
    wide = Olmo2Config(
        vocab_size=131072,
        hidden_size=128,
        intermediate_size=65536,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    Olmo2ForCausalLM(wide).save_pretrained(root / "wide")


def launch(processes: int, models: Path, shared: Path, more: Callable[[Path], list[Step]]) -> Path:
    """Return the results of every layout of this world size and of ``more`` steps."""

    def make(root: Path) -> None:
        steps = more(root)
        for name, layout in LAYOUTS.items():
            if layout.processes == processes:
                steps += steps_of(name, models, root)
        run_live(steps, processes)

    return once(shared / f"with-{processes}", make)


@pytest.fixture(scope="session")
def with_1(models: Path, shared: Path) -> Path:
    plain, half = models / "plain", models / "half"
    return launch(1, models, shared, lambda root: [
        step("logits", half, "tp1", root / "half-tp1", batch=HALF_BATCH),
        step("stock_load", plain, "tp1", root / "stock-tp1"),
        step("decays", plain, "tp1", root / "decays-tp1"),
        *train_steps("tp1", models, root),
    ])  # fmt: skip


@pytest.fixture(scope="session")
def with_2(models: Path, shared: Path) -> Path:
    plain, half, tied = models / "plain", models / "half", models / "tied"
    return launch(2, models, shared, lambda root: [
        step("logits", half, "tp2", root / "half-tp2", batch=HALF_BATCH),
        step("stock_load", plain, "tp2", root / "stock-tp2"),
        step("stock_load", plain, "pp2", root / "stock-pp2"),
        step("decays", plain, "pp2", root / "decays-pp2"),
        step("decays", tied, "pp2-tied", root / "decays-pp2-tied"),
        *(step("gradients", plain, "tp2", root / mutant, batch=BATCH, mutant=mutant)
          for mutant in MUTANTS),
        *(each for layout in ("tp2", "pp2", "dp2") for each in train_steps(layout, models, root)),
    ])  # fmt: skip


@pytest.fixture(scope="session")
def with_4(models: Path, shared: Path) -> Path:
    # Runs first: memory freed by other steps could be reused without being counted.
    memory = ["export_memory"] if sys.platform == "linux" else []
    return launch(
        4,
        models,
        shared,
        lambda root: [
            *(step(action, models / "wide", "tp2-pp2", root / "export") for action in memory),
            step("export", models / "plain", "tp2-pp2", root / "export"),
        ],
    )


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Name of each layout."""
    return request.param


@pytest.fixture
def results(layout: str, request: pytest.FixtureRequest) -> Path:
    """Folder of the results of this layout's world size, with one folder for each layout."""
    return request.getfixturevalue(f"with_{LAYOUTS[layout].processes}")
