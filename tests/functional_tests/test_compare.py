"""`compare` finds each classic mistake, says so by its exit code, and names where it starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import olmo_bridge
from safetensors.torch import load_file, save_file
from transformers import Olmo2Config, Olmo2ForCausalLM

from megatron_olmo_bridge import import_checkpoint, verify
from megatron_olmo_bridge.inference.compare import compare

LAYER = 2
"""The layer that mistakes in weights are planted in."""
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many key/value heads as heads, so that q_norm and k_norm can be mixed up at all."""
    folder = tmp_path_factory.mktemp("hf") / "mha"
    torch.manual_seed(3)
    model = Olmo2ForCausalLM(
        Olmo2Config(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-6,
                    rope_theta=500000.0, initializer_range=0.08, pad_token_id=None)
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        a, b = (f"model.layers.{LAYER}.{name}.weight" for name in (first, second))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


WEIGHTS = {
    "q_norm and k_norm": swap("self_attn.q_norm", "self_attn.k_norm"),
    "post norms": swap("post_attention_layernorm", "post_feedforward_layernorm"),
}
CONFIG = {
    "eps": {"rms_norm_eps": 1e-5},
    "theta": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
}


def planted(hf: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of the model with its weights changed."""
    shutil.copytree(hf, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_no_mistake(hf: Path, tmp_path: Path) -> None:
    import_checkpoint(hf, tmp_path / "mg")
    found = compare(hf, tmp_path / "mg", tp=2, sp=True, pp=1, tokens=64)

    assert found.magnitude >= 1
    assert found.equal and found.parts_at is None
    assert found.max_error <= 1e-5
    assert found.top1_agreement == 1
    assert found.kl_divergence < 1e-9
    assert abs(found.loss[0] - found.loss[1]) < 1e-5
    assert [layer.name for layer in found.layers] == [
        "embedding", "layer 0", "layer 1", "layer 2", "layer 3", "final norm", "logits"
    ]  # fmt: skip


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_a_mistake_in_the_weights_of_a_layer(hf: Path, tmp_path: Path, mistake: str) -> None:
    found = compare(hf, planted(hf, tmp_path / "planted", WEIGHTS[mistake]), tokens=64)

    assert not found.equal
    assert found.parts_at == f"layer {LAYER}"
    assert found.config_differences == []


@pytest.mark.parametrize("mistake", CONFIG)
def test_a_mistake_in_the_config(hf: Path, tmp_path: Path, mistake: str) -> None:
    """It is in every layer, and so starts in the first."""
    shutil.copytree(hf, tmp_path / "planted")
    config = json.loads((hf / "config.json").read_text())
    (tmp_path / "planted/config.json").write_text(json.dumps(config | CONFIG[mistake]))
    # Enough tokens that late positions turn far, where another theta shows.
    found = compare(hf, tmp_path / "planted", tokens=64)

    assert not found.equal
    assert found.parts_at == "layer 0"
    (line,) = found.config_differences
    assert line.startswith({"eps": "layernorm_epsilon: 1e-06 and 1e-05",
                            "theta": "rotary_base: 500000.0 and 10000.0"}[mistake])  # fmt: skip


def test_one_ulp_is_for_verify(hf: Path, tmp_path: Path) -> None:
    def to_bfloat16(tensors: Tensors) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    def one_ulp(tensors: Tensors) -> None:
        name = f"model.layers.{LAYER}.mlp.down_proj.weight"
        tensors[name] = (tensors[name].view(torch.int16) + 1).view(torch.bfloat16)

    reference = planted(hf, tmp_path / "reference", to_bfloat16)
    other = planted(reference, tmp_path / "other", one_ulp)

    (difference,) = verify(reference, other).differences
    assert difference.name == f"model.layers.{LAYER}.mlp.down_proj.weight"
    assert difference.detail.startswith(f"{64 * 128} of {64 * 128} differ")
    found = compare(reference, other, tokens=64)
    assert found.parts_at == f"layer {LAYER}"


def test_the_command_line(hf: Path, tmp_path: Path) -> None:
    other = planted(hf, tmp_path / "planted", swap("mlp.gate_proj", "mlp.up_proj"))
    done = olmo_bridge("compare", hf, other, "--dtype", "bfloat16")

    assert done.exit_code == 1
    assert f"NOT the same. The hidden states part at: layer {LAYER}." in done.stdout
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.endswith("differs") for line in lines) >= 2
