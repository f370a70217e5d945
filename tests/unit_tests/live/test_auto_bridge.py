"""AutoBridge: opening, building, loading and saving with the names that users know."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from transformers import Olmo2Config as TransformersConfig
from transformers import Olmo2ForCausalLM

from megatron_olmo_bridge import AutoBridge, export_checkpoint, import_checkpoint, verify
from megatron_olmo_bridge.convert.options import ImportOptions
from megatron_olmo_bridge.errors import (
    FormatError,
    InputError,
    MappingError,
    OutputError,
    UnsupportedError,
)
from megatron_olmo_bridge.live import save
from megatron_olmo_bridge.models.olmo2.provider import Olmo2ModelProvider

HFFactory = Callable[..., Path]
needs_process = pytest.mark.usefixtures("one_process")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def live(hf: Path, **fields: Any) -> tuple[AutoBridge, list[torch.nn.Module]]:
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    return bridge, provider.provide_distributed_model(wrap_with_ddp=False)


def logits_of(chunks: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return chunks[0](tokens, positions, None)


# -------------------------------------------------------------------------------------- opening


def test_a_checkpoint_is_opened_by_its_headers(make_hf: HFFactory) -> None:
    hf = make_hf()
    for path in (hf, str(hf)):
        bridge = AutoBridge.from_hf_pretrained(path)
        assert bridge.model_bridge.num_layers == 3
        assert bridge.source is not None
        assert bridge.source.path == hf


def test_a_megatron_checkpoint_is_opened_by_another_name(
    tiny_hf: Path, tiny_megatron: Path
) -> None:
    numbers = AutoBridge.from_hf_pretrained(tiny_hf).model_bridge.config_values
    for path in (tiny_megatron, tiny_megatron / "iter_0000000", tiny_hf):
        assert AutoBridge.from_checkpoint(path).model_bridge.config_values == numbers
    with pytest.raises(InputError) as caught:
        AutoBridge.from_hf_pretrained(tiny_megatron)
    assert str(caught.value) == (
        f"{tiny_megatron}: is a Megatron torch_dist checkpoint; use AutoBridge.from_checkpoint()"
    )


def test_a_megatron_checkpoint_takes_the_options_of_its_opening(
    tiny_hf: Path, tiny_megatron: Path
) -> None:
    with pytest.raises(InputError, match="has no iter_0000007"):
        AutoBridge.from_checkpoint(tiny_megatron, iteration=7)
    bridge = AutoBridge.from_checkpoint(tiny_megatron, iteration=0, hf_config=tiny_hf)
    assert bridge.source is not None
    assert bridge.source.config_from == tiny_hf / "config.json"


def test_can_handle(make_hf: HFFactory, tiny_megatron: Path, tmp_path: Path) -> None:
    assert AutoBridge.can_handle(make_hf())
    assert AutoBridge.can_handle(str(make_hf("early", architectures=["Olmo1124ForCausalLM"])))
    other = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert not AutoBridge.can_handle(make_hf("llama", **other))
    assert not AutoBridge.can_handle(tiny_megatron)
    assert not AutoBridge.can_handle(tmp_path / "absent")
    damaged = make_hf("damaged")
    (damaged / "model.safetensors").write_bytes(b"short")
    assert not AutoBridge.can_handle(damaged)


def test_what_is_no_olmo2_checkpoint_is_refused(make_hf: HFFactory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder, and not a hub id"):
        AutoBridge.from_hf_pretrained(tmp_path / "absent")
    with pytest.raises(UnsupportedError, match="architecture LlamaForCausalLM is not known"):
        AutoBridge.from_hf_pretrained(make_hf("llama", architectures=["LlamaForCausalLM"]))
    damaged = make_hf("damaged")
    (damaged / "model.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        AutoBridge.from_hf_pretrained(damaged)
    with pytest.raises(MappingError, match=r"model\.norm\.weight"):
        AutoBridge.from_hf_pretrained(make_hf("less", change=lambda t: t.pop("model.norm.weight")))


def test_the_supported_models_are_architectures() -> None:
    found = AutoBridge.list_supported_models()
    assert found[:2] == ["Olmo2ForCausalLM", "Olmo1124ForCausalLM"]
    assert "GPT2LMHeadModel" in found and "gpt2" not in found


# ------------------------------------------------------------------------------- by config alone


def test_a_config_of_any_form(make_hf: HFFactory) -> None:
    hf = make_hf()
    values = json.loads((hf / "config.json").read_text())
    expected = AutoBridge.from_hf_pretrained(hf).model_bridge.config_values
    for config in (values, hf, str(hf), TransformersConfig.from_pretrained(hf)):
        bridge = AutoBridge.from_hf_config(config)
        assert bridge.model_bridge.config_values == expected
        assert bridge.source is None


def test_a_config_that_cannot_be_is_refused(make_hf: HFFactory, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="not known here"):
        AutoBridge.from_hf_config({"model_type": "llama"})
    with pytest.raises(InputError, match=r"^the config: .*num_hidden_layers"):
        AutoBridge.from_hf_config({"model_type": "olmo2", "num_hidden_layers": 0})
    with pytest.raises(InputError, match=r"config\.json"):
        AutoBridge.from_hf_config(tmp_path)


def test_a_config_has_no_weights(reference: Any) -> None:
    bridge = AutoBridge.from_hf_config(reference.config)
    with pytest.raises(InputError) as caught:
        bridge.to_megatron_provider()
    assert str(caught.value) == (
        "made from a config, there are no weights: pass load_weights=False, or hf_path"
    )
    with pytest.raises(InputError, match="there is no checkpoint to load from"):
        bridge.load_hf_weights([torch.nn.Linear(1, 1)])


@needs_process
def test_a_model_by_config_alone_is_random_and_can_be_saved(reference: Any, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_config(reference.config | {"num_hidden_layers": 2})
    provider = bridge.to_megatron_provider(load_weights=False)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    norms = {n: p for n, p in model[0].named_parameters() if "norm" in n}
    assert all((p == 1).all() for p in norms.values())
    for name, parameter in model[0].named_parameters():
        if name not in norms:
            assert 0.005 < parameter.std() < 0.05, name
    bridge.save_hf_pretrained(model, tmp_path / "hf")
    again = Olmo2ForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        expected = again(tokens).logits
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------- providers


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_providers_dtype_is_the_checkpoints(stored: torch.dtype, make_hf: HFFactory) -> None:
    # What the config says may differ from what the files hold; these count.
    hf = make_hf(dtype=stored, torch_dtype="float32")
    provider = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
    assert type(provider) is Olmo2ModelProvider
    assert provider.params_dtype is stored
    other = AutoBridge.from_hf_pretrained(hf).to_megatron_provider(dtype=torch.float64)
    assert other.params_dtype is torch.float64


@pytest.mark.parametrize(
    ("says", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": None, "dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"torch_dtype": None}, torch.float32),
    ],
)
def test_a_configs_dtype_of_any_spelling(
    says: dict[str, Any], dtype: torch.dtype, reference: Any
) -> None:
    bridge = AutoBridge.from_hf_config(reference.config | says)
    assert bridge.to_megatron_provider(load_weights=False).params_dtype is dtype


def test_a_configs_dtype_that_is_none_is_refused(reference: Any) -> None:
    bridge = AutoBridge.from_hf_config(reference.config | {"torch_dtype": "float8_e4m3fn"})
    with pytest.raises(InputError) as caught:
        bridge.to_megatron_provider(load_weights=False)
    assert str(caught.value) == (
        "the config's dtype 'float8_e4m3fn' is none of float32, bfloat16, float16"
    )
    provider = bridge.to_megatron_provider(load_weights=False, dtype=torch.bfloat16)
    assert provider.params_dtype is torch.bfloat16


@needs_process
def test_weights_of_several_dtypes_need_one_to_be_named(make_hf: HFFactory) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6

    hf = make_hf(dtype=torch.bfloat16, change=widen)
    bridge = AutoBridge.from_hf_pretrained(hf)
    with pytest.raises(InputError) as caught:
        bridge.to_megatron_provider()
    assert str(caught.value) == "the weights are bfloat16 and float32: pass dtype="
    provider = bridge.to_megatron_provider(dtype=torch.float32)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    found = dict(bridge.export_hf_weights(model))
    assert all(torch.equal(found[name], t.float()) for name, t in weights(hf).items())


@needs_process
def test_a_model_is_filled_when_it_is_built_unless_it_is_not_to_be(make_hf: HFFactory) -> None:
    hf = make_hf()
    bridge, model = live(hf)
    expected = weights(hf)
    found = dict(bridge.export_hf_weights(model))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    unfilled = bridge.to_megatron_provider(load_weights=False)
    model = unfilled.provide_distributed_model(wrap_with_ddp=False)
    assert (dict(bridge.export_hf_weights(model))["model.norm.weight"] == 1).all()
    bridge.load_hf_weights(model)
    found = dict(bridge.export_hf_weights(model))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@needs_process
@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"head_dim": 6}])
def test_logits_are_those_of_transformers(change: dict[str, Any], make_hf: HFFactory) -> None:
    hf = make_hf(**change)
    tokens = torch.arange(40).view(2, 20) * 7 % 101
    with torch.no_grad():
        expected = Olmo2ForCausalLM.from_pretrained(hf)(tokens).logits
    assert expected.abs().max() > 0.5
    found = logits_of(live(hf)[1], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_process
def test_a_model_of_another_shape_is_refused_by_name(make_hf: HFFactory) -> None:
    bridge = AutoBridge.from_hf_pretrained(make_hf())
    provider = bridge.to_megatron_provider()
    provider.ffn_hidden_size = 60
    with pytest.raises(MappingError) as caught:
        provider.provide_distributed_model(wrap_with_ddp=False)
    assert str(caught.value) == (
        "decoder.layers.0.mlp.linear_fc1.weight has shape [120, 36] in the model, the config asks "
        "for [100, 36]"
    )


@needs_process
def test_a_model_of_one_checkpoint_is_not_saved_as_another(
    make_hf: HFFactory, tmp_path: Path
) -> None:
    _, model = live(make_hf())
    other = AutoBridge.from_hf_pretrained(make_hf("other", intermediate_size=60))
    with pytest.raises(MappingError, match=r"linear_fc1\.weight has shape"):
        other.save_hf_pretrained(model, tmp_path / "out")
    with pytest.raises(MappingError, match=r"linear_fc1\.weight has shape"):
        next(other.export_hf_weights(model))
    assert not (tmp_path / "out").exists()


@needs_process
def test_a_value_too_large_for_float16_is_refused(make_hf: HFFactory) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][100, 35] = 1e6

    bridge = AutoBridge.from_hf_pretrained(make_hf(change=enlarge))
    provider = bridge.to_megatron_provider(dtype=torch.float16)
    with pytest.raises(InputError, match=r"output_layer\.weight are too large for float16"):
        provider.provide_distributed_model(wrap_with_ddp=False)


# ----------------------------------------------------------------------- saving as Hugging Face


@needs_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_the_one_that_was_loaded(
    dtype: torch.dtype, make_hf: HFFactory, tmp_path: Path
) -> None:
    hf, out = make_hf(dtype=dtype), tmp_path / "deep" / "out"
    bridge, model = live(hf, make_vocab_size_divisible_by=128)
    out.parent.mkdir()
    bridge.save_hf_pretrained(model, out)
    assert verify(hf, out).equal
    assert verify(out).equal
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (hf / "config.json").read_text()
    )
    assert (out / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert not (out / "README.md").exists()
    assert Olmo2ForCausalLM.from_pretrained(out).dtype is dtype


@needs_process
def test_the_saved_config_names_the_models_dtype(make_hf: HFFactory, tmp_path: Path) -> None:
    bridge, model = live(make_hf(), params_dtype=torch.bfloat16)
    bridge.save_hf_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}


@needs_process
@pytest.mark.parametrize("size", ["20KB", 20_000])
def test_shards_of_the_size_that_is_asked_for(
    size: str | int, make_hf: HFFactory, tmp_path: Path
) -> None:
    hf, out = make_hf(), tmp_path / "out"
    bridge, model = live(hf)
    bridge.save_hf_pretrained(model, out, max_shard_size=size)
    files = list(out.glob("*.safetensors"))
    assert len(files) > 5
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 20_000
    assert (out / "model.safetensors.index.json").exists()
    assert verify(hf, out).equal


@needs_process
def test_what_is_there_is_not_overwritten_unless_told_to(
    make_hf: HFFactory, tmp_path: Path
) -> None:
    hf, out = make_hf(), tmp_path / "out"
    bridge, model = live(hf)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="exists"):
        bridge.save_hf_pretrained(model, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == before, "something was left behind"

    bridge.save_hf_pretrained(model, out, overwrite=True)
    assert verify(hf, out).equal
    assert not (out / "notes.txt").exists()


@needs_process
def test_an_empty_folder_is_saved_into(
    make_hf: HFFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place: a save that was interrupted there is in nobody's way either."""
    hf = make_hf()
    bridge, model = live(hf)
    for name, saved in (("a", bridge.save_hf_pretrained), ("b", bridge.save_megatron_model)):
        out = tmp_path / name
        out.mkdir()
        inode = out.stat().st_ino
        saved(model, out)
        assert verify(hf, out).equal
        assert out.stat().st_ino == inode
        with pytest.raises(OutputError, match="exists already"):
            saved(model, out)

    (tmp_path / "c").mkdir()
    interrupted_save(bridge, model, tmp_path / "c", monkeypatch)
    assert not AutoBridge.can_handle(tmp_path / "c")
    bridge.save_hf_pretrained(model, tmp_path / "c")
    assert verify(hf, tmp_path / "c").equal


@needs_process
def test_a_full_disk_is_said_and_nothing_is_left(
    make_hf: HFFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bridge, model = live(make_hf())
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(save, "write_all", fail)
    with pytest.raises(OutputError, match=r"the disk is full\. Nothing was kept"):
        bridge.save_hf_pretrained(model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def interrupted_save(
    bridge: AutoBridge, model: list[torch.nn.Module], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(save, "write_all", stop)
        with pytest.raises(KeyboardInterrupt):
            bridge.save_hf_pretrained(model, out)


@needs_process
def test_what_an_interrupted_save_leaves_is_no_checkpoint(
    make_hf: HFFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, model = live(make_hf())
    interrupted_save(bridge, model, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()
    assert not AutoBridge.can_handle(tmp_path / "out.partial")
    bridge.save_hf_pretrained(model, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "hf", tmp_path / "out").equal


@needs_process
def test_what_is_no_saves_is_not_removed(make_hf: HFFactory, tmp_path: Path) -> None:
    bridge, model = live(make_hf())
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="no conversion made it"):
        bridge.save_hf_pretrained(model, tmp_path / "out")
    assert (partial / "notes.txt").read_text() == "mine"


@needs_process
def test_after_an_interrupted_save_the_next_one_begins_anew(
    make_hf: HFFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, model = live(make_hf())
    interrupted_save(bridge, model, tmp_path / "out", monkeypatch)
    bridge.save_hf_pretrained(model, tmp_path / "out")
    assert verify(tmp_path / "hf", tmp_path / "out").equal


# --------------------------------------------------------------------------- saving as Megatron


@needs_process
@pytest.mark.parametrize("multiple", [1, 128])
def test_a_saved_megatron_checkpoint_is_that_of_the_import(
    multiple: int, make_hf: HFFactory, tmp_path: Path
) -> None:
    hf, out = make_hf(dtype=torch.bfloat16), tmp_path / "out"
    bridge, model = live(hf, make_vocab_size_divisible_by=multiple)
    bridge.save_megatron_model(model, out, iteration=12)
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "12"
    assert (out / "iter_0000012").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert verify(hf, out).equal
    import_checkpoint(
        hf, tmp_path / "imported", ImportOptions(make_vocab_size_divisible_by=multiple)
    )
    assert verify(tmp_path / "imported", out).equal
    export_checkpoint(out, tmp_path / "back")
    assert verify(hf, tmp_path / "back").equal
    assert (tmp_path / "back" / "tokenizer.json").exists()


@needs_process
def test_a_saved_megatron_checkpoint_loads_with_any_fields(
    make_hf: HFFactory, tmp_path: Path
) -> None:
    hf, out = make_hf(), tmp_path / "out"
    bridge, model = live(hf)
    bridge.save_megatron_model(model, out)
    for path in (out, out / "iter_0000000"):
        again = bridge.load_megatron_model(
            path, make_vocab_size_divisible_by=64, params_dtype=torch.bfloat16
        )
        found = dict(bridge.export_hf_weights(again))
        assert all(torch.equal(found[n], t.bfloat16()) for n, t in weights(hf).items())
    training = bridge.load_megatron_model(out, wrap_with_ddp=True)
    assert type(training[0]).__name__ == "DistributedDataParallel"


def test_an_unknown_field_is_refused(tiny_hf: Path, tiny_megatron: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(tiny_hf)
    with pytest.raises(InputError) as caught:
        bridge.load_megatron_model(tiny_megatron, tensor_parallel=2)
    assert "has no field 'tensor_parallel'; did you mean 'tensor_model_par" in str(caught.value)


@needs_process
def test_what_is_there_is_not_overwritten_by_a_megatron_checkpoint(
    make_hf: HFFactory, tmp_path: Path
) -> None:
    bridge, model = live(make_hf())
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        bridge.save_megatron_model(model, out)
    assert str(caught.value) == f"{out}: exists already; name another folder"
    shutil.rmtree(out)

    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        bridge.save_megatron_model(model, out)
    assert str(caught.value) == f"{partial}: is in the way, and no save's. Move it away."
    assert (partial / "notes.txt").read_text() == "mine"
    shutil.rmtree(partial)

    out.mkdir()  # an empty folder is nothing
    bridge.save_megatron_model(model, out)
    assert verify(out, tmp_path / "hf").equal


@needs_process
def test_what_a_killed_save_left_is_no_checkpoint_and_in_nobodys_way(
    make_hf: HFFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, model = live(make_hf())

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dist_checkpointing, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        bridge.save_megatron_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises((InputError, FormatError)):
        AutoBridge.from_checkpoint(tmp_path / "out.partial")
    monkeypatch.undo()
    bridge.save_megatron_model(model, tmp_path / "out")
    assert verify(tmp_path / "hf", tmp_path / "out").equal
    assert not (tmp_path / "out.partial").exists()
