"""The Transformer Engine spec without Transformer Engine: wiring, names and checkpoints.

Its kernels are not put to the test here; the tests in ``gpu/`` do that. But constructors, names of
parameters and extra states, the checkpoint's keys and the order of operations are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from launching import HERE, TOKENS
from transformers import Olmo2ForCausalLM

from megatron_olmo_bridge import import_checkpoint, synth, verify

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("olmo2-tiny", tmp_path_factory.mktemp("hf") / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def out(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process found that has the stand-in on its path."""
    out = tmp_path_factory.mktemp("out")
    megatron = hf.parent / "megatron"
    import_checkpoint(hf, megatron)
    command = [sys.executable, "-W", "ignore", str(HERE / "te_wiring.py")]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_STEP_NUM_TASKS")}
    path = os.pathsep.join([str(HERE / "te_stand_in"), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, str(hf), str(megatron), json.dumps(TOKENS), str(out)],
        capture_output=True, text=True, env=env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def found(out: Path) -> Found:
    return json.loads((out / "found.json").read_text())


def logits(out: Path, name: str) -> torch.Tensor:
    return torch.load(out / f"{name}.pt")


def transformers_logits(hf: Path, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return Olmo2ForCausalLM.from_pretrained(hf, dtype=dtype)(torch.tensor(TOKENS)).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_is_made_of_transformer_engine(found: Found, dtype: str) -> None:
    assert found[f"auto {dtype}"]["made of"] == {
        "linear_qkv": "TEColumnParallelLinear",
        "linear_proj": "TERowParallelLinearPostLN",
        "linear_fc1": "TEColumnParallelLinear",
        "linear_fc2": "TERowParallelLinearPostLN",
        "core_attention": "TEDotProductAttention",
        "post_layernorm": "RMSNorm",
        "q_layernorm": "QRMSNorm",
        "k_layernorm": "KRMSNorm",
        "final_layernorm": "RMSNorm",
    }
    assert found[f"local {dtype}"]["made of"]["linear_proj"] == "RowParallelLinearPostLN"
    assert found[f"auto {dtype}"]["eps"] == [1e-6]


def test_float32_logits_are_those_of_transformers(hf: Path, out: Path) -> None:
    expected = transformers_logits(hf, torch.float32)
    assert expected.abs().max() > 1
    for name in ("auto float32", "local float32"):
        assert (logits(out, name) - expected).abs().max() <= 1e-5, name


def test_bfloat16_logits_are_as_near_as_those_of_transformers(hf: Path, out: Path) -> None:
    exact = transformers_logits(hf, torch.float32)
    theirs = (transformers_logits(hf, torch.bfloat16).float() - exact).pow(2).mean().sqrt()
    for name in ("auto bfloat16", "local bfloat16"):
        ours = (logits(out, name) - exact).pow(2).mean().sqrt()
        assert ours <= 1.2 * theirs, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_is_that_of_the_local_spec(found: Found, dtype: str) -> None:
    tokens = found[f"auto {dtype}"]["generated"]
    assert len(tokens) == 8
    assert tokens == found[f"local {dtype}"]["generated"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strict", ["raise_all", "raise_unexpected"])
def test_an_import_has_exactly_what_stock_megatron_asks_for(
    found: Found, strict: str, dtype: str
) -> None:
    """Also with ``raise_all``: nothing is absent, and nothing is there that isn't asked for."""
    loaded = found[f"auto {dtype}"][strict]
    assert loaded["nan"] == []
    attention = [f"decoder.layers.{i}.self_attention.core_attention._extra_state" for i in range(4)]
    assert loaded["missing"] == attention
    layer = (
        "self_attention.linear_qkv", "self_attention.linear_proj",
        "self_attention.linear_proj.post_layernorm", "mlp.linear_fc1", "mlp.linear_fc2",
        "mlp.linear_fc2.post_layernorm", "self_attention.core_attention",
    )  # fmt: skip
    states = {f"decoder.layers.{i}.{name}._extra_state" for i in range(4) for name in layer}
    found_states = {name for name in loaded["states"] if not name.startswith("output_layer.")}
    assert found_states == states | {"decoder.final_layernorm._extra_state"}


def test_the_same_import_loads_into_the_local_spec(found: Found) -> None:
    loaded = found["local float32"]["raise_unexpected"]
    assert loaded["nan"] == loaded["missing"] == []


def test_saved_checkpoints_are_those_that_were_loaded(hf: Path, out: Path) -> None:
    assert verify(hf, out / "hf").equal
    assert verify(hf, out / "megatron").equal
