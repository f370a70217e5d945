"""A checkpoint that transformers loads gives the same weights, or is refused with instructions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import edit_json, edit_tensors
from launching import olmo_bridge
from safetensors.torch import load_file, save_file
from slow import slow_but
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, synth, verify
from megatron_olmo_bridge.convert.options import ImportOptions
from megatron_olmo_bridge.errors import MappingError
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import as_classifier, published_sizes

SIZES = [name for name in published_sizes() if name.endswith("-tiny")]
QUICK = ["gpt2-tiny", "olmo2-tiny", "olmoe-tiny"]
EXPERTS = ["olmoe-tiny", "flex-olmo-tiny"]
ONE, HEAD, INDEX = "model.safetensors", "lm_head.weight", "model.safetensors.index.json"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=slow_but(QUICK, SIZES))
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bridge(size: str) -> type[ModelBridge]:
    return published_sizes()[size]


@pytest.fixture
def hf(size: str, tmp_path: Path) -> Path:
    return synth(size, tmp_path / "hf", dtype="float32")


def weights(folder: Path, auto: Any = AutoModelForCausalLM) -> Tensors:
    """Return every weight of the model in transformers; none may be missing."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    return dict(model.state_dict())


def there_and_back(hf: Path) -> Path:
    import_checkpoint(hf, hf.parent / "m")
    export_checkpoint(hf.parent / "m", hf.parent / "back")
    assert verify(hf, hf.parent / "m").equal
    assert verify(hf, hf.parent / "back").equal
    return hf.parent / "back"


def assert_same(hf: Path, auto: Any = AutoModelForCausalLM) -> None:
    """Check that transformers loads the same model from the export as from the source."""
    expected, found = weights(hf, auto), weights(there_and_back(hf), auto)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def tie(hf: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=True))
    edit_tensors(hf / ONE, lambda t: t.pop(HEAD, None))


def rename(hf: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(hf / ONE)
    save_file({new_name(name): t for name, t in tensors.items()}, hf / ONE, {"format": "pt"})


def refused(hf: Path, *says: str) -> None:
    done = olmo_bridge("import", hf, hf.parent / "m")
    assert done.exit_code == 2
    for words in says:
        assert words in " ".join(done.output.split()), done.output
    assert not (hf.parent / "m").exists()


# ------------------------------------------------------------------------------- the tied head


def test_only_the_head_is_stored(hf: Path, bridge: type[ModelBridge]) -> None:
    tie(hf)
    rename(hf, lambda name: HEAD if name == bridge.hf_embedding else name)
    assert_same(hf)


@pytest.mark.parametrize("file", [ONE, "model-of-the-head.safetensors"])
def test_an_index_may_name_a_tied_head_that_no_file_has(hf: Path, file: str) -> None:
    tie(hf)
    weight_map = dict.fromkeys(load_file(hf / ONE), ONE) | {HEAD: file}
    (hf / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    there_and_back(hf)


def test_a_stale_index_is_ignored(hf: Path) -> None:
    (hf / INDEX).write_text(json.dumps({"weight_map": {HEAD: "model-00001-of-00009.safetensors"}}))
    assert_same(hf)


# -------------------------------------------------------------------------------------- names


def test_a_base_model_saved_alone_is_imported(
    hf: Path, bridge: type[ModelBridge], tmp_path: Path
) -> None:
    tie(hf)
    AutoModel.from_pretrained(hf).save_pretrained(tmp_path / "base")
    assert bridge.hf_embedding not in load_file(tmp_path / "base" / ONE)
    assert_same(tmp_path / "base")


def test_a_base_model_without_a_tied_head_has_no_head(hf: Path, tmp_path: Path) -> None:
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=False))
    AutoModel.from_pretrained(hf).save_pretrained(tmp_path / "base")
    refused(
        tmp_path / "base", "missing (1): - lm_head.weight", "A model saved without its head",
        "AutoModelForCausalLM", "--num-labels", "set tie_word_embeddings to true",
    )  # fmt: skip


@pytest.mark.parametrize("size", ["olmo-tiny", "olmo2-tiny", "olmo3-tiny"])
def test_a_base_model_becomes_a_classifier(hf: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(hf).save_pretrained(tmp_path / "base")
    import_checkpoint(tmp_path / "base", tmp_path / "m", ImportOptions(num_labels=3))
    export_checkpoint(tmp_path / "m", tmp_path / "back")
    assert weights(tmp_path / "back", AutoModelForSequenceClassification)["score.weight"].shape == (
        3, 128,
    )  # fmt: skip


@pytest.mark.parametrize("size", ["olmo-tiny", "olmo2-tiny", "olmo3-tiny"])
def test_a_left_over_language_model_head_is_dropped(hf: Path, size: str, tmp_path: Path) -> None:
    config = as_classifier(json.loads((hf / "config.json").read_text()), 3)
    (hf / "config.json").write_text(json.dumps(config))
    edit_tensors(hf / ONE, lambda t: t.update({"score.weight": torch.randn(3, 128)}))
    done = olmo_bridge("import", hf, tmp_path / "shown")
    assert "lm_head.weight was left out: a classifier" in " ".join(done.output.split())
    assert_same(hf, AutoModelForSequenceClassification)


def test_a_class_name_with_a_prefix_is_recognized(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (name,) = config["architectures"]
    edit_json(hf / "config.json", lambda c: c.update(architectures=[f"FSDP{name}"]))
    assert_same(hf)


def test_a_tensor_stored_under_two_names_is_refused(hf: Path, bridge: type[ModelBridge]) -> None:
    bare = bridge.hf_embedding.partition(".")[2]
    edit_tensors(hf / ONE, lambda t: t.update({bare: t[bridge.hf_embedding] + 1}))
    refused(hf, f"has both {bridge.hf_embedding} and {bare}, which mean the same")


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("_orig_mod.", "torch.compile put it there"),
        ("module.", "a data-parallel wrapper put it there"),
        ("base_model.model.", "PEFT put it there: merge the adapter"),
        ("_fsdp_wrapped_module.", "FSDP put it there"),
        ("wrapped.", "Names begin with 'wrapped.'"),
        ("model.", "Names begin with 'model.'"),
    ],
)
def test_prefixes_of_wrappers_in_names_are_explained(hf: Path, prefix: str, says: str) -> None:
    rename(hf, lambda name: f"{prefix}{name}")
    refused(hf, prefix, says, "save_pretrained()")


def test_prefixes_of_compiled_layers_in_names_are_explained(hf: Path) -> None:
    rename(hf, lambda name: name.replace(".0.", ".0._orig_mod."))
    refused(hf, "'_orig_mod.'", "torch.compile")


def test_an_adapter_inside_a_base_model_is_refused_by_name(hf: Path) -> None:
    rename(hf, lambda name: name.replace(".weight", ".base_layer.weight"))
    refused(hf, "PEFT adapter", "merge_and_unload()")


# ------------------------------------------------------------------------------ layout and dtype


@pytest.mark.parametrize("size", EXPERTS)
def test_experts_stored_as_one_tensor_are_imported(hf: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hf)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = load_file(tmp_path / "fused" / ONE)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert verify(hf, tmp_path / "fused").equal
    assert_same(tmp_path / "fused")


@pytest.mark.parametrize("size", EXPERTS)
def test_experts_of_another_shape_are_refused(hf: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hf)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    name = "model.layers.0.mlp.experts.down_proj"
    edit_tensors(tmp_path / "fused" / ONE, lambda t: t.update({name: t[name].transpose(1, 2)}))
    with pytest.raises(MappingError, match=rf"{name} has shape .* the config asks for"):
        import_checkpoint(tmp_path / "fused", tmp_path / "m")


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.float32, torch.bfloat16]
)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_buffers_of_any_dtype_are_skipped(tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    hf = synth("gpt2-tiny", tmp_path / "hf", dtype="float32")
    rename(hf, lambda name: name.replace("transformer.", prefix))
    mask = torch.ones(1, 1, 128, 128).tril().to(dtype)
    edit_tensors(
        hf / ONE,
        lambda t: t.update({f"{prefix}h.{i}.attn.bias": mask.clone() for i in range(4)}
                           | {f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4).to(dtype)}),
    )  # fmt: skip
    assert_same(hf)


@pytest.mark.parametrize("size", [size for size in SIZES if size != "gpt2-tiny"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_rope_buffers_of_any_dtype_are_skipped(hf: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(hf / ONE, lambda t: t.update({name: torch.ones(8, dtype=dtype)}))
    assert_same(hf)
