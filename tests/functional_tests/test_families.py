"""Every family and head converts offline without loss, and an invalid tensor is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import ITERATION, edit_json, edit_tensors
from launching import olmo_bridge
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from trees import tree_hash

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, inspect, synth, verify
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.storage.execute import WriteOptions

SIZES = [name for name in published_sizes() if name.endswith("-tiny")]
CLASSIFIERS = ["olmo-tiny", "olmo2-tiny", "olmo3-tiny"]
ONE = "model.safetensors"
SCREEN = 24
BATCH = torch.randint(1000, (2, 64), generator=torch.Generator().manual_seed(1))
"""Longer than olmo3-tiny's window (16) and its original context (32)."""


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def hf(size: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of a model. Read-only."""
    return synth(size, tmp_path_factory.mktemp(size) / "hf", dtype="float32")


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    """Import of the same model. Read-only."""
    import_checkpoint(hf, hf.parent / "megatron")
    return hf.parent / "megatron"


def loaded(folder: Path, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Load a model in transformers without missing or unexpected tensors."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not {kind: names for kind, names in report.items() if names}
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(BATCH).logits


# ------------------------------------------------------------------------------ nothing is lost


def test_roundtrip(hf: Path, megatron: Path, size: str, tmp_path: Path) -> None:
    assert verify(hf, megatron).equal
    export_checkpoint(megatron, tmp_path / "back")
    assert verify(hf, tmp_path / "back").equal and verify(megatron, tmp_path / "back").equal

    mine, theirs = load_file(hf / ONE), load_file(tmp_path / "back" / ONE)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert json.loads((hf / "config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )
    expected, found = logits(loaded(hf)), logits(loaded(tmp_path / "back"))
    assert expected.abs().max() >= 1
    assert torch.equal(expected, found)
    assert inspect(megatron).size == inspect(hf).size == size


def test_a_change_of_dtype_equals_that_of_torch(hf: Path, tmp_path: Path) -> None:
    import_checkpoint(
        hf, tmp_path / "half", ImportOptions(dtype="bfloat16"), WriteOptions(workers=2)
    )
    export_checkpoint(tmp_path / "half", tmp_path / "back", ExportOptions(dtype="float32"))
    mine, theirs = load_file(hf / ONE), load_file(tmp_path / "back" / ONE)
    assert all(torch.equal(mine[name].bfloat16().float(), theirs[name]) for name in mine)


def test_norm_gains_are_random(hf: Path, size: str) -> None:
    gains = [t for n, t in load_file(hf / ONE).items() if re.search(r"(norm|ln_.)\.weight$", n)]
    assert bool(gains) == (size != "olmo-tiny")  # OLMo's norms have no weights
    assert all(g.min() >= 0.5 and g.max() <= 1.5 and g.std() > 0.1 for g in gains)


def test_old_names_and_buffers_of_gpt2_are_read(tmp_path: Path) -> None:
    """Checkpoints of 2019 have no ``transformer.`` prefix and contain causal masks."""
    hf = synth("gpt2-tiny", tmp_path / "hf", dtype="float32")
    old = shutil.copytree(hf, tmp_path / "old")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(4):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()

    edit_tensors(old / ONE, rename)
    import_checkpoint(old, tmp_path / "megatron")
    assert verify(hf, tmp_path / "megatron").equal


# ---------------------------------------------------------------------------------------- heads


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(f"{request.param}-classifier")
    synth(request.param, root / "hf", dtype="float32")
    config = AutoConfig.from_pretrained(root / "hf", num_labels=5, pad_token_id=0)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(root / "classifier")
    return root / "classifier"


def test_a_classifier_survives_the_round_trip(classifier: Path, tmp_path: Path) -> None:
    import_checkpoint(classifier, tmp_path / "megatron")
    assert verify(classifier, tmp_path / "megatron").equal
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert verify(classifier, tmp_path / "back").equal

    auto = AutoModelForSequenceClassification
    found = logits(loaded(tmp_path / "back", auto))
    assert found.shape == (2, 5)
    assert torch.equal(found, logits(loaded(classifier, auto)))


def test_a_new_head_is_reported(tmp_path: Path) -> None:
    hf = synth("olmo2-tiny", tmp_path / "hf", dtype="float32")
    done = olmo_bridge("import", hf, tmp_path / "megatron", "--num-labels", 3)
    assert done.exit_code == 0, done.stderr
    assert "The head is new: score.weight, 3 rows of zeros." in done.stdout
    record = json.loads((tmp_path / "megatron" / ITERATION / "olmo_bridge.json").read_text())
    assert record["options"]["new_head_of_zeros"] == 3

    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    found, source = load_file(tmp_path / "back" / ONE), load_file(hf / ONE)
    assert found.keys() == source.keys() - {"lm_head.weight"} | {"score.weight"}
    assert torch.equal(found.pop("score.weight"), torch.zeros(3, 128))
    assert all(torch.equal(found[name], source[name]) for name in found)
    model = loaded(tmp_path / "back", AutoModelForSequenceClassification)
    assert model.config.num_labels == 3


@pytest.mark.parametrize(
    ("size", "says"),
    [("gpt2-tiny", "GPT2LMHeadModel has no classification head"),
     ("olmoe-tiny", "OlmoeForCausalLM has no classification head")],
)  # fmt: skip
def test_a_missing_head_is_refused(size: str, says: str, tmp_path: Path) -> None:
    hf = synth(size, tmp_path / "hf")
    done = olmo_bridge("import", hf, tmp_path / "megatron", "--num-labels", 3)
    assert done.exit_code == 2
    assert f"{hf / 'config.json'}: {says}" in done.stderr


# ------------------------------------------------------------------------------ what is refused


def patterns(hf: Path) -> dict[str, str]:
    """Return one tensor of each kind: that of layer 1 (and expert 1), or the only one."""
    found: dict[str, str] = {}
    for name in load_file(hf / ONE):
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if kind not in found or re.fullmatch(r"[^\d]*(\.1\.[^\d]*)+", name):
            found[kind] = name
    return found


def refused(before: Path, *command: object) -> str:
    """Return the message of a refused command, which must leave the folder unchanged."""
    tree = tree_hash(before)
    done = olmo_bridge(*command)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("olmo-bridge: ") == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= SCREEN
    assert tree_hash(before) == tree
    return str(done.stderr)


def hf_commands(src: Path) -> list[tuple[object, ...]]:
    return [("import", src, src.parent / "dst"), ("inspect", src)]


Tensors = dict[str, torch.Tensor]
TENSOR_FAULTS: dict[str, Callable[[Tensors, str], object]] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "unexpected": lambda tensors, name: tensors.update({f"{name}_scale": torch.ones(1)}),
    "shape": lambda tensors, name: tensors.update({name: tensors[name][:-1]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_fault_in_any_kind_of_tensor_is_refused(
    hf: Path, megatron: Path, tmp_path: Path, fault: str
) -> None:
    for name in patterns(hf).values():
        shutil.rmtree(tmp_path / "src", ignore_errors=True)
        src = shutil.copytree(hf, tmp_path / "src")
        edit_tensors(src / ONE, lambda tensors, name=name: TENSOR_FAULTS[fault](tensors, name))
        for command in hf_commands(src):
            said = refused(tmp_path, *command)
            assert fault in said and name in said
        done = olmo_bridge("verify", megatron, src)
        assert done.exit_code == 1
        assert name in done.stdout


def config_faults(hf: Path) -> list[tuple[str, object]]:
    """Return four wrong values for every integer of the config that determines a shape."""
    config = json.loads((hf / "config.json").read_text())
    counts = (
        "n_layer", "n_embd", "n_head", "num_hidden_layers", "hidden_size", "vocab_size",
        "intermediate_size", "num_attention_heads", "num_experts", "num_experts_per_tok",
    )  # fmt: skip
    values: tuple[object, ...] = (None, -1, "8", 2.5)
    return [(key, value) for key in counts if key in config for value in values]


def test_a_fault_in_any_number_of_the_config_is_refused(hf: Path, tmp_path: Path) -> None:
    src = shutil.copytree(hf, tmp_path / "src")
    for key, value in config_faults(hf):
        shutil.copy(hf / "config.json", src)
        edit_json(src / "config.json", lambda x, key=key, value=value: x.update({key: value}))
        for command in hf_commands(src):
            assert "config.json" in refused(tmp_path, *command)


def test_a_wrong_number_of_layers_is_refused(hf: Path, tmp_path: Path) -> None:
    src = shutil.copytree(hf, tmp_path / "src")
    config = json.loads((hf / "config.json").read_text())
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    for layers, fault in ((config[key] + 4, "missing"), (1, "unexpected")):
        edit_json(
            src / "config.json", lambda x, n=layers: (x.update({key: n}), x.pop("layer_types", 0))
        )
        for command in hf_commands(src):
            assert fault in refused(tmp_path, *command)


def test_a_truncated_file_is_refused(hf: Path, megatron: Path, tmp_path: Path) -> None:
    src = shutil.copytree(hf, tmp_path / "src")
    data = (src / ONE).read_bytes()
    (src / ONE).write_bytes(data[: len(data) // 2])
    for command in hf_commands(src):
        said = refused(tmp_path, *command)
        assert ONE in said and "truncated" in said

    other = shutil.copytree(megatron, tmp_path / "megatron")
    file = other / ITERATION / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for command in (("export", other, tmp_path / "dst"), ("inspect", other)):
        said = refused(tmp_path, *command)
        assert "__0_0.distcp" in said and "truncated" in said


@pytest.mark.parametrize("other", SIZES)
def test_a_checkpoint_with_the_config_of_another_family_is_refused(
    hf: Path, size: str, other: str, tmp_path: Path
) -> None:
    """OLMo-2 and OLMo-3 have the same tensors, so only their vocabularies differ."""
    if other == size:
        return
    src = shutil.copytree(hf, tmp_path / "src")
    (src / "config.json").write_text(json.dumps(published_sizes()[other].sizes[other]))
    families = [published_sizes()[name].family for name in (size, other)]
    for command in hf_commands(src):
        said = refused(tmp_path, *command)
        if set(families) == {"olmo2", "olmo3"}:
            assert "wrong shape" in said
        else:
            assert f"The names are those of {families[0]}" in said or "or " + families[0] in said
            assert f"the config is of {families[1]}" in said
