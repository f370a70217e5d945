"""Imports load into stock megatron-core at any layout and give the logits of transformers.

The model is poisoned with NaN before stock ``dist_checkpointing.load``, so a parameter that the
checkpoint does not fill shows in the logits.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from launching import TOKENS, run_script, stock, tokens_argument
from transformers import Olmo2ForCausalLM

from megatron_olmo_bridge import import_checkpoint, inspect, synth
from megatron_olmo_bridge.convert.options import ImportOptions
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder

LAYOUTS = {
    "tp1": ((), 1),
    "tp2": (("--tp", 2), 2),
    "tp2-sp": (("--tp", 2, "--sp"), 2),
    "pp2": (("--pp", 2), 2),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("olmo2-tiny", tmp_path_factory.mktemp("hf") / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def imported(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron") / "tiny"
    import_checkpoint(hf, root)
    return root


def hf_logits(folder: Path) -> torch.Tensor:
    model = Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers(
    hf: Path, imported: Path, tmp_path: Path, layout: str
) -> None:
    arguments, processes = LAYOUTS[layout]
    stock("load", "--hf", hf, "--checkpoint", imported / "iter_0000000", "--strict",
          "raise_unexpected", "--tokens", tokens_argument(), "--logits", tmp_path / "logits.pt",
          *arguments, processes=processes)  # fmt: skip
    logits = torch.load(tmp_path / "logits.pt")
    assert (logits - hf_logits(hf)).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_a_published_shape(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, layout: str
) -> None:
    """The 1B model in float32; $OLMO_BRIDGE_1B names an HF folder that is reused by all layouts."""
    hf = Path(os.environ.get("OLMO_BRIDGE_1B", tmp_path / "hf"))
    if not hf.exists():
        synth("olmo2-1b", hf, dtype="float32")
    import_checkpoint(hf, tmp_path / "mg")
    arguments, processes = LAYOUTS[layout]
    stock("load", "--hf", hf, "--checkpoint", tmp_path / "mg/iter_0000000", "--strict",
          "raise_unexpected", "--tokens", tokens_argument(), "--logits", tmp_path / "logits.pt",
          *arguments, processes=processes)  # fmt: skip
    error = (torch.load(tmp_path / "logits.pt") - hf_logits(hf)).abs().max()
    print(f"olmo2-1b {layout}: largest logit error {error:.2e}")
    assert error <= 1e-4


def test_keys_shapes_and_objects_equal_those_of_the_model(
    hf: Path, imported: Path, tmp_path: Path
) -> None:
    stock("keys", "--hf", hf, "--json", tmp_path / "keys.json")
    asked = json.loads((tmp_path / "keys.json").read_text())
    written = TorchDistFolder.read(imported / "iter_0000000")

    assert {k: [t.dtype, list(t.shape)] for k, t in written.tensors.items()} == {
        k: [t["dtype"].removeprefix("torch."), t["shape"]] for k, t in asked["tensors"].items()
    }
    # A local model requests no absent key. The keys that it does not request are the extra states
    # of the norms, which Transformer Engine's norms request.
    assert set(asked["objects"]) <= set(written.objects)
    norms = {
        "decoder.final_layernorm._extra_state/shard_0_1",
        *(
            f"decoder.layers.{linear}.post_layernorm._extra_state/shard_{layer}_4"
            for linear in ("self_attention.linear_proj", "mlp.linear_fc2")
            for layer in range(4)
        ),
    }
    assert set(written.objects) - set(asked["objects"]) == norms


def test_a_padded_vocabulary_loads(hf: Path, tmp_path: Path) -> None:
    import_checkpoint(hf, tmp_path / "mg", ImportOptions(make_vocab_size_divisible_by=768))
    stock("load", "--hf", hf, "--checkpoint", tmp_path / "mg/iter_0000000",
          "--vocab-divisible-by", 768, "--strict", "raise_unexpected", "--tp", 2,
          "--tokens", tokens_argument(), "--logits", tmp_path / "logits.pt",
          processes=2)  # fmt: skip
    logits = torch.load(tmp_path / "logits.pt")  # without those of padding rows
    assert (logits - hf_logits(hf)).abs().max() <= 1e-5


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core has no megatron.training (0.19 for Python 3.12 has)",
)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("release", [False, True])
def test_stock_megatron_lm_loads_it_with_the_printed_flags(
    hf: Path, tmp_path: Path, processes: int, release: bool
) -> None:
    import_checkpoint(hf, tmp_path / "mg", ImportOptions(release=release))
    flags = inspect(tmp_path / "mg").megatron_flags
    parallel = ["--tensor-model-parallel-size", processes] if processes > 1 else []
    run_script("megatron_training_load", tmp_path / "mg", "--logits", tmp_path / "logits.pt",
               "--", *flags, *parallel, processes=processes)  # fmt: skip
    found = torch.load(tmp_path / "logits.pt")
    model = Olmo2ForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        expected = model(found["tokens"]).logits
    assert (found["logits"] - expected).abs().max() <= 1e-5
