"""`compare` finds each common mistake, reports it by its exit code, and names where it starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import olmo_bridge
from safetensors.torch import load_file, save_file
from slow import slow_but
from transformers import Olmo2Config, Olmo2ForCausalLM

from megatron_olmo_bridge import import_checkpoint, synth, verify
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.inference.compare import compare, run_transformers

pytest_plugins = ["warm_jobs"]
DTYPES = ("float32", "bfloat16")
"""Mistakes must exceed rounding errors clearly enough to be found in 16 bits too. In bfloat16 the
measured errors of the logits are 2.1 (q_norm and k_norm) to 32 (theta) times transformers' own."""
LAYER = 2
"""Layer in which mistakes in weights are planted."""
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model with as many key/value heads as heads, so that q_norm and k_norm can be swapped."""
    folder = tmp_path_factory.mktemp("hf") / "mha"
    torch.manual_seed(3)
    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            rope_theta=500000.0,
            initializer_range=0.08,
            pad_token_id=None,
        )
    )
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
    """Copy the model and change its weights."""
    shutil.copytree(hf, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_equal_models_are_equal(hf: Path, tmp_path: Path) -> None:
    import_checkpoint(hf, tmp_path / "mg")
    found = compare(hf, tmp_path / "mg", tp=2, sp=True, pp=1, tokens=64)

    assert found.magnitude >= 1
    assert found.equal and found.differs_from is None
    assert found.max_error <= 1e-5
    assert found.top1_agreement == 1
    assert found.kl_divergence < 1e-9
    assert abs(found.loss[0] - found.loss[1]) < 1e-5
    assert [layer.name for layer in found.layers] == [
        "embedding",
        "layer 0",
        "layer 1",
        "layer 2",
        "layer 3",
        "final norm",
        "logits",
    ]


@pytest.mark.usefixtures("warm_jobs")
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], DTYPES))
@pytest.mark.parametrize("mistake", WEIGHTS)
def test_a_mistake_in_the_weights_of_a_layer_is_found(
    hf: Path, tmp_path: Path, mistake: str, dtype: str
) -> None:
    other = planted(hf, tmp_path / "planted", WEIGHTS[mistake])
    found = compare(hf, other, tokens=64, dtype=dtype)

    assert not found.equal
    assert found.differs_from == f"layer {LAYER}"
    assert found.config_differences == []


@pytest.mark.usefixtures("warm_jobs")
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], DTYPES))
@pytest.mark.parametrize("mistake", CONFIG)
def test_a_mistake_in_the_config_is_found(
    hf: Path, tmp_path: Path, mistake: str, dtype: str
) -> None:
    """Such a mistake affects every layer, so it starts in the first."""
    shutil.copytree(hf, tmp_path / "planted")
    config = json.loads((hf / "config.json").read_text())
    (tmp_path / "planted/config.json").write_text(json.dumps(config | CONFIG[mistake]))
    # Another theta shows at late positions, so there must be enough tokens.
    found = compare(hf, tmp_path / "planted", tokens=64, dtype=dtype)

    assert not found.equal
    assert found.differs_from == "layer 0"
    (line,) = found.config_differences
    assert line.startswith(
        {"eps": "layernorm_epsilon: 1e-06 and 1e-05", "theta": "rotary_base: 500000.0 and 10000.0"}[
            mistake
        ]
    )


@pytest.mark.usefixtures("warm_jobs")
@pytest.mark.parametrize("layout", [{}, {"ep": 2}], ids=["tp1", "ep2"])
def test_a_mistake_in_a_mixture_of_experts_is_found(tmp_path: Path, layout: dict[str, int]) -> None:
    """Gate and up of all experts are swapped; bfloat16 is judged by the median token."""
    hf = synth("olmoe-tiny", tmp_path / "hf")

    def swap_gate_and_up(tensors: Tensors) -> None:
        for name in [name for name in tensors if "gate_proj" in name]:
            other = name.replace("gate_proj", "up_proj")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    other = planted(hf, tmp_path / "planted", swap_gate_and_up)

    assert compare(hf, hf, dtype="bfloat16", **layout).differs_from is None
    found = compare(hf, other, dtype="bfloat16", **layout)
    assert not found.equal
    assert found.differs_from == "layer 0"


@pytest.mark.usefixtures("warm_jobs")
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
    assert found.differs_from == f"layer {LAYER}"


def test_the_command_prints_the_first_layer_that_differs(hf: Path, tmp_path: Path) -> None:
    other = planted(hf, tmp_path / "planted", swap("mlp.gate_proj", "mlp.up_proj"))
    done = olmo_bridge("compare", hf, other, "--dtype", "bfloat16", "--tokens", 50)

    assert done.exit_code == 1
    assert "50 tokens in bfloat16" in done.stdout
    assert "(1.5 x transformers' own in bfloat16)" in done.stdout
    assert f"NOT the same. They differ from layer {LAYER} on." in done.stdout
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.endswith("differs") for line in lines) >= 2


def test_json_says_on_how_many_tokens_and_what_was_allowed(hf: Path) -> None:
    done = olmo_bridge("compare", hf, hf, "--tokens", 5, "--dtype", "bfloat16", "--json")

    found = json.loads(done.stdout)["result"]
    assert (found["equal"], found["tokens"], found["dtype"]) == (True, 5, "bfloat16")
    assert found["measure"] == "mean error"
    assert found["bound"] == "1.5 x transformers' own in bfloat16"
    embedding, logits = found["layers"][0], found["layers"][-1]
    assert logits["error"] <= logits["allowed"]
    assert embedding["allowed"] > 0  # the float32 weights are rounded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", 2049], "2049 tokens are more than the model's 2048 positions"),
        (["--dtype", "keep"], "keep"),
        (["--prompt", "text"], "has no tokenizer"),
    ],
)
def test_bad_input(hf: Path, arguments: list[object], message: str) -> None:
    done = olmo_bridge("compare", hf, hf, *arguments)

    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_model_that_overflows_is_refused(hf: Path, tmp_path: Path) -> None:
    """transformers' own logits are NaN in float16, so there is nothing to compare with."""

    def enlarge(tensors: Tensors) -> None:
        tensors["lm_head.weight"] *= 60000 / tensors["lm_head.weight"].abs().max()

    large = planted(hf, tmp_path / "large", enlarge)
    with pytest.raises(InputError, match="transformers' own logits in float16 are not finite"):
        run_transformers(large, torch.arange(8)[None], "float16")
