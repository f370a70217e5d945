"""Relative difference of each weight of two checkpoints."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_olmo_bridge import export_checkpoint, import_checkpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions
from megatron_olmo_bridge.inference.weights import WeightDifference, summarize, weight_differences


def test_a_converted_checkpoint_has_equal_weights(tiny_hf: Path, tmp_path: Path) -> None:
    import_checkpoint(tiny_hf, tmp_path / "m", ImportOptions(make_vocab_size_divisible_by=3000))
    hf = open_checkpoint(tiny_hf)
    found = weight_differences(hf, open_checkpoint(tmp_path / "m"))
    assert [w.name for w in found] == list(hf.tensors)
    assert {w.relative for w in found} == {0.0}


def test_the_difference_is_relative_to_the_reference(tiny_hf: Path, tmp_path: Path) -> None:
    scaled, zero, damaged = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
    export_checkpoint_as_float32(tiny_hf, tmp_path)
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    tensors[zero].zero_()
    not_finite = "model.layers.0.mlp.up_proj.weight"
    tensors[not_finite][0, :2] = torch.tensor([math.nan, math.inf])  # in both: no difference
    save_file(tensors, file)
    reference = open_checkpoint(tmp_path / "hf")
    changed = tmp_path / "changed"
    changed.mkdir()
    for artifact in (tmp_path / "hf").iterdir():
        (changed / artifact.name).write_bytes(artifact.read_bytes())
    tensors[scaled] *= 1.25
    tensors[zero][0, 0] = 1.0
    tensors[damaged][3, 5] = math.nan
    save_file(tensors, changed / "model.safetensors")
    found = {w.name: w.relative for w in weight_differences(reference, open_checkpoint(changed))}
    assert found.pop(scaled) == pytest.approx(0.25, rel=1e-6)
    assert found.pop(zero) == math.inf
    assert math.isnan(found.pop(damaged))
    assert set(found.values()) == {0.0}


def export_checkpoint_as_float32(hf: Path, folder: Path) -> None:
    import_checkpoint(hf, folder / "m", ImportOptions(dtype="float32"))
    export_checkpoint(folder / "m", folder / "hf", ExportOptions())


def test_the_summary_names_the_weight_that_differs_most() -> None:
    equal, small, large = (WeightDifference(n, v) for n, v in (("a", 0.0), ("b", 0.1), ("c", 0.25)))
    assert summarize([equal]) == "all 1 are equal"
    assert summarize([equal, small, large]) == "2 of 3 differ, most c: relative difference 0.25"
    nan = WeightDifference("d", math.nan)
    assert summarize([small, nan, large]).startswith(
        "3 of 3 differ, most d: relative difference nan"
    )
