"""The layer spec in stock megatron-core computes what transformers computes, at any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from launching import stock
from safetensors.torch import load_file
from transformers import Olmo2ForCausalLM

TOKENS = [[(5 * row + 11 * column * column) % 256 for column in range(16)] for row in range(2)]
TP2_PP2 = ("--tp", 2, "--pp", 2)
LAYOUTS = {
    "tp1": ((), 1),
    "tp2": (("--tp", 2), 2),
    "tp2-sp": (("--tp", 2, "--sp"), 2),
    "pp2": (("--pp", 2), 2),
    "pp2-vpp2": (("--pp", 2, "--vpp", 2), 2),
}
SAVES = {
    "stacked keys": TP2_PP2,
    "per-layer keys": (*TP2_PP2, "--per-layer-keys"),
    "singleton shards": (*TP2_PP2, "--per-layer-keys", "singleton_local_shards"),
    "vpp, sp, trained": (*TP2_PP2, "--vpp", 2, "--sp", "--optimizer"),
    "per-layer keys, trained": (*TP2_PP2, "--per-layer-keys", "--optimizer", "fully_reshardable"),
    "data parallel, trained": ("--tp", 2, "--optimizer"),
    "bfloat16, trained": (*TP2_PP2, "--dtype", "bfloat16", "--optimizer", "adam"),
}


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "hf")


@pytest.fixture(scope="module")
def saved(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint saved by one process."""
    out = tmp_path_factory.mktemp("saved") / "run"
    stock("save", "--hf", hf, "--out", out)
    return out


def transformers_logits(hf: Path, run: Path) -> torch.Tensor:
    """Of the tensors that the saving script says it saved, as an ordinary HF folder."""
    folder = run / "as_hf"
    folder.mkdir(exist_ok=True)
    shutil.copy(hf / "config.json", folder)
    shutil.copy(run / "expected.safetensors", folder / "model.safetensors")
    model, report = Olmo2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def megatron_logits(
    hf: Path, run: Path, *arguments: object, processes: int = 1, scratch: Path
) -> torch.Tensor:
    stock("load", "--hf", hf, "--checkpoint", run / "iter_0000007", "--logits",
          scratch / "logits.pt", "--tokens", json.dumps(TOKENS), *arguments,
          processes=processes)  # fmt: skip
    return torch.load(scratch / "logits.pt")


def assert_parity(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1, "logits near zero would agree whatever the model does"
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_at_any_layout(hf: Path, saved: Path, tmp_path: Path, layout: str) -> None:
    arguments, processes = LAYOUTS[layout]
    found = megatron_logits(hf, saved, *arguments, processes=processes, scratch=tmp_path)
    assert_parity(found, transformers_logits(hf, saved))


@pytest.mark.parametrize("save", SAVES)
def test_logits_of_any_save(hf: Path, saved: Path, tmp_path: Path, save: str) -> None:
    run = tmp_path / "run"
    stock("save", "--hf", hf, "--out", run, *SAVES[save], processes=4)
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert_parity(megatron_logits(hf, run, scratch=tmp_path), transformers_logits(hf, run))
    if "trained" not in save:
        one, four = (load_file(r / "expected.safetensors") for r in (saved, run))
        assert one.keys() == four.keys()
        assert all(torch.equal(one[name], four[name]) for name in one)


def test_tied_embeddings_over_two_stages(tmp_path: Path) -> None:
    hf, run = write_config(tmp_path / "hf", tie_word_embeddings=True), tmp_path / "run"
    stock("save", "--hf", hf, "--out", run, "--pp", 2, processes=2)
    assert_parity(megatron_logits(hf, run, scratch=tmp_path), transformers_logits(hf, run))


def test_keys_are_those_of_the_saved_checkpoint(hf: Path, tmp_path: Path) -> None:
    stock("keys", "--hf", hf, "--json", tmp_path / "keys.json", "--vocab-divisible-by", 96)
    keys = json.loads((tmp_path / "keys.json").read_text())
    shapes = {name: tensor["shape"] for name, tensor in keys["tensors"].items()}
    assert shapes == {
        "embedding.word_embeddings.weight": [288, 64],
        "decoder.layers.self_attention.linear_qkv.weight": [4, 128, 64],
        "decoder.layers.self_attention.q_layernorm.weight": [4, 64],
        "decoder.layers.self_attention.k_layernorm.weight": [4, 32],
        "decoder.layers.self_attention.linear_proj.weight": [4, 64, 64],
        "decoder.layers.self_attention.linear_proj.post_layernorm.weight": [4, 64],
        "decoder.layers.mlp.linear_fc1.weight": [4, 256, 64],
        "decoder.layers.mlp.linear_fc2.weight": [4, 64, 128],
        "decoder.layers.mlp.linear_fc2.post_layernorm.weight": [4, 64],
        "decoder.final_layernorm.weight": [64],
        "output_layer.weight": [288, 64],
    }
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj",
               "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
    states = {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_4"
        for linear in linears
        for layer in range(4)
    }
    assert set(keys["objects"]) == states
