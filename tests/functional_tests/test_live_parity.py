"""A live model that loads its own weights gives the logits of transformers at every layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from live_layouts import (
    BATCH,
    HALF_BATCH,
    LAYOUTS,
    hf_tensors,
    random_tokens,
    run_live,
    step,
    worst,
)
from transformers import Olmo2ForCausalLM

from megatron_olmo_bridge import synth

pytest_plugins = ["live_runs"]


def hf_logits(folder: Path, batch: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    model, report = Olmo2ForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model(random_tokens(*batch)).logits.float()


def logit_errors(ranks: list[torch.Tensor], expected: torch.Tensor) -> dict[str, float]:
    """Return the largest error of each rank."""
    assert all(found.shape == expected.shape for found in ranks)
    return {f"rank {i}": float((found - expected).abs().max()) for i, found in enumerate(ranks)}


@pytest.mark.parametrize("model", ["plain", "tied", "half"])
def test_the_models_reveal_mistakes(models: Path, model: str) -> None:
    """A model with zero weights, norm gains of one, or equal numbers of heads would hide
    mistakes."""
    config = json.loads((models / model / "config.json").read_text())
    assert config["num_attention_heads"] != config["num_key_value_heads"]
    gains = [t.float() for name, t in hf_tensors(models / model).items() if "norm" in name]
    assert len(gains) == 4 * config["num_hidden_layers"] + 1
    for gain in gains:
        assert gain.min() >= 0.5
        assert gain.max() <= 1.5
        assert gain.std() > 0.2
    assert hf_logits(models / model, BATCH, torch.float32).abs().max() >= 1


def test_logits_equal_those_of_transformers(models: Path, layout: str, results: Path) -> None:
    poisoned = json.loads((results / layout / "poisoned.json").read_text())
    assert poisoned == [True] * LAYOUTS[layout].processes, "NaN, until it is loaded"
    expected = hf_logits(models / LAYOUTS[layout].model, BATCH, torch.float32)
    ranks = torch.load(results / layout / "logits.pt")
    assert len(ranks) == LAYOUTS[layout].tensor * LAYOUTS[layout].data
    _, error = worst(logit_errors(ranks, expected))
    print(f"{layout}: largest logit error {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_bfloat16_is_as_accurate_as_in_transformers(
    models: Path, layout: str, results: Path
) -> None:
    """Both load the same bfloat16 weights and are measured against transformers in float32."""
    exact = hf_logits(models / "half", HALF_BATCH, torch.float32)
    theirs = (hf_logits(models / "half", HALF_BATCH, torch.bfloat16) - exact).abs()
    ours = (torch.load(results / f"half-{layout}" / "logits.pt")[0] - exact).abs()
    mean, largest = float(ours.mean() / theirs.mean()), float(ours.max() / theirs.max())
    print(
        f"{layout}: error of theirs, mean {theirs.mean():.2e}, max {theirs.max():.2e}; "
        f"ratio of ours, mean {mean:.3f}, max {largest:.3f}"
    )
    assert theirs.mean() > 0
    assert mean <= 1.2
    assert largest <= 1.2


@pytest.mark.slow
def test_logits_of_a_published_shape(tmp_path: Path) -> None:
    """The 1B model in float32 at TP 2; $OLMO_BRIDGE_1B names an HF folder that is reused."""
    hf = Path(os.environ.get("OLMO_BRIDGE_1B", tmp_path / "hf"))
    if not hf.exists():
        synth("olmo2-1b", hf, dtype="float32")
    run_live([step("logits", hf, "tp2", tmp_path, batch=(2, 16))], processes=2)
    expected = hf_logits(hf, (2, 16), torch.float32)
    assert expected.abs().max() >= 1
    _, error = worst(logit_errors(torch.load(tmp_path / "logits.pt"), expected))
    print(f"olmo2-1b tp2: largest logit error {error:.1e}")
    assert error <= 1e-4
