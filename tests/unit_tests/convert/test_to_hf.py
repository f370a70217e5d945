"""Export: the Hugging Face folder, from our own imports and from checkpoints that torch saved."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_olmo_bridge.checkpoints.hf_files import parse_size
from megatron_olmo_bridge.convert.average import average_checkpoints
from megatron_olmo_bridge.convert.options import AverageOptions, ExportOptions, ImportOptions
from megatron_olmo_bridge.convert.to_hf import export_checkpoint, plan_exports
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.errors import FormatError, InputError, MappingError, UnsupportedError
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge

HF = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same(a: Tensors, b: Tensors) -> bool:
    assert a.keys() == b.keys()
    assert {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
    return all(torch.equal(a[name], b[name]) for name in a)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_export_reverses_import(
    make_hf: HF, tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    hf = make_hf(dtype=dtype, tie_word_embeddings=tied)
    import_checkpoint(hf, tmp_path / "m", ImportOptions(make_vocab_size_divisible_by=128))
    export_checkpoint(tmp_path / "m", tmp_path / "back")
    assert same(load(tmp_path / "back"), load(hf))
    artifacts = ["config.json", "generation_config.json", "tokenizer.json"]
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == [
        *artifacts[:2], "model.safetensors", "olmo_bridge.json", artifacts[2],
    ]  # fmt: skip
    for name in artifacts:
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_the_dtype_can_be_changed(make_hf: HF, tmp_path: Path, target: str) -> None:
    hf = make_hf(dtype=torch.bfloat16)
    import_checkpoint(hf, tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "back", ExportOptions(dtype=target))
    cast = {name: tensor.to(getattr(torch, target)) for name, tensor in load(hf).items()}
    assert same(load(tmp_path / "back"), cast)
    assert config_of(tmp_path / "back") == config_of(hf) | {"torch_dtype": target}


def test_the_dtype_is_recorded_under_the_configs_own_key(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    config = config_of(hf)
    config["dtype"] = config.pop("torch_dtype")
    (hf / "config.json").write_text(json.dumps(config))
    import_checkpoint(hf, tmp_path / "m", ImportOptions(dtype="bfloat16"))
    export_checkpoint(tmp_path / "m", tmp_path / "back")
    assert config_of(tmp_path / "back") == config | {"dtype": "bfloat16"}


@pytest.mark.parametrize("stale", ["float32", "float16", None])
def test_the_dtype_is_recorded_under_both_keys_if_there_are_two(
    make_hf: HF, tmp_path: Path, stale: str | None
) -> None:
    """transformers 5 reads ``dtype``, 4 ``torch_dtype``: neither may say another."""
    hf = make_hf(dtype=torch.float32)
    both = {"dtype": "float32", "torch_dtype": "float32"}
    config = config_of(hf) | both | {"torch_dtype": stale}
    (hf / "config.json").write_text(json.dumps(config))

    import_checkpoint(hf, tmp_path / "m", ImportOptions(dtype="bfloat16"))
    export_checkpoint(tmp_path / "m", tmp_path / "a")
    import_checkpoint(hf, tmp_path / "kept")
    export_checkpoint(tmp_path / "kept", tmp_path / "b", ExportOptions(dtype="float16"))
    export_checkpoint(tmp_path / "kept", tmp_path / "c")
    average_checkpoints([hf, hf], tmp_path / "d", AverageOptions(dtype="bfloat16"))

    written = tmp_path / "m/iter_0000000/hf", tmp_path / "a", tmp_path / "d"
    for folder in written:
        assert config_of(folder) == config | dict.fromkeys(both, "bfloat16")
    assert config_of(tmp_path / "b") == config | dict.fromkeys(both, "float16")
    assert config_of(tmp_path / "c") == config | both


@pytest.mark.parametrize(("limit", "count"), [("5GB", 1), ("40KB", 4), (1, 36)])
def test_shards_have_at_most_the_given_number_of_bytes(
    make_hf: HF, tmp_path: Path, limit: str | int, count: int
) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "back", ExportOptions(max_shard_size=limit))
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert same(load(tmp_path / "back"), load(hf))
    if count == 1:
        assert [s.name for s in shards] == ["model.safetensors"]
        assert not (tmp_path / "back/model.safetensors.index.json").exists()
        return
    total = len(shards)
    assert total >= count
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)
    ]
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    sizes = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"].pop(name) == shard.name
            tensors = [opened.get_tensor(n) for n in opened.keys()]  # noqa: SIM118
        sizes[shard.name] = sum(t.nbytes for t in tensors)
        assert len(tensors) == 1 or sizes[shard.name] <= parse_size(limit)
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == sum(sizes.values())


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("200kb", 200_000), ("7", 7), (9, 9),
     ("2GiB", 2 << 30)],
)  # fmt: skip
def test_sizes_are_parsed(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5TB", "0", "0GB", "5 G", "1e9", "0.1"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)


# ----------------------------------------------------------------- what a checkpoint says of itself


@pytest.fixture
def state(reference: SimpleNamespace) -> SimpleNamespace:
    """A model's Hugging Face tensors, the same stacked as in Megatron, and its bridge."""
    tensors = reference.state_dict(reference.config, torch.float32, 5)
    megatron = reference.stacked(reference.parameters(tensors, reference.config), reference.config)
    return SimpleNamespace(hf=tensors, megatron=megatron, bridge=Olmo2Bridge(reference.config))


def pad(tensors: Tensors, rows: int) -> Tensors:
    vocab = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {n: torch.cat([t, torch.randn(rows - 101, 36)]) if n in vocab else t
            for n, t in tensors.items()}  # fmt: skip


Save = Callable[..., Path]


def test_the_config_is_read_from_megatron_lms_args(
    state: SimpleNamespace, save_torch_dist: Save, tmp_path: Path
) -> None:
    folder = save_torch_dist("m", pad(state.megatron, 128), seed=4)
    args = state.bridge.megatron_args(128, "float32")
    torch.save({"args": argparse.Namespace(**args)}, folder / "common.pt")
    export_checkpoint(folder, tmp_path / "hf")
    assert same(load(tmp_path / "hf"), state.hf)  # trained padding rows are cut off
    assert Olmo2Bridge(config_of(tmp_path / "hf")).config_values == state.bridge.config_values
    assert config_of(tmp_path / "hf")["torch_dtype"] == "float32"


def test_the_config_is_read_from_a_run_config(
    state: SimpleNamespace, save_torch_dist: Save, tmp_path: Path
) -> None:
    folder = save_torch_dist("m", state.megatron)
    run_config = {"model": state.bridge.run_config_model(101, "float32"), "train": {}}
    text = yaml.safe_dump(run_config) + "extra: !!python/object/apply:os.system ['false']\n"
    (folder / "run_config.yaml").write_text(text)
    export_checkpoint(folder, tmp_path / "hf")
    assert same(load(tmp_path / "hf"), state.hf)
    assert Olmo2Bridge(config_of(tmp_path / "hf")).config_values == state.bridge.config_values


def test_the_config_is_read_from_the_folder_that_the_user_names(
    state: SimpleNamespace, save_torch_dist: Save, make_hf: HF, tmp_path: Path
) -> None:
    folder = save_torch_dist("m", state.megatron)
    with pytest.raises(InputError, match=r"doesn't say what model it holds .* Pass --hf-config"):
        export_checkpoint(folder, tmp_path / "hf2")
    export_checkpoint(folder, tmp_path / "hf2", ExportOptions(hf_config=make_hf()))
    assert same(load(tmp_path / "hf2"), state.hf)
    assert (tmp_path / "hf2/tokenizer.json").exists()
    with pytest.raises(InputError, match=r"no config\.json"):
        export_checkpoint(folder, tmp_path / "hf3", ExportOptions(hf_config=tmp_path))


def test_a_padded_vocabulary_that_is_not_recorded_is_asked_for(
    state: SimpleNamespace, save_torch_dist: Save, tmp_path: Path
) -> None:
    folder = save_torch_dist("m", pad(state.megatron, 128))
    args = state.bridge.megatron_args(128, "float32") | {"vocab_size": None}
    torch.save({"args": argparse.Namespace(**args)}, folder / "common.pt")
    with pytest.raises(InputError, match="pass --vocab-size N"):
        export_checkpoint(folder, tmp_path / "hf")
    export_checkpoint(folder, tmp_path / "hf", ExportOptions(vocab_size=101))
    assert same(load(tmp_path / "hf"), state.hf)


def test_the_vocabulary_of_a_config_can_be_overruled(
    state: SimpleNamespace, save_torch_dist: Save, make_hf: HF, tmp_path: Path
) -> None:
    folder = save_torch_dist("m", state.megatron)
    hf = make_hf("c")
    export_checkpoint(folder, tmp_path / "hf2", ExportOptions(hf_config=hf, vocab_size=90))
    assert config_of(tmp_path / "hf2") == config_of(hf) | {"vocab_size": 90}
    assert torch.equal(load(tmp_path / "hf2")["lm_head.weight"], state.hf["lm_head.weight"][:90])
    with pytest.raises(InputError, match="101 rows, fewer than the vocabulary of 102"):
        export_checkpoint(folder, tmp_path / "hf3", ExportOptions(hf_config=hf, vocab_size=102))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", r"run_config\.yaml: not sound YAML"),
        ("a: \0", r"run_config\.yaml: not sound YAML"),
        ("model: !!timestamp x", r"run_config\.yaml: not sound YAML"),
        ("model: !!bool x", r"run_config\.yaml: not sound YAML"),
        ("model: !!int ''", r"run_config\.yaml: not sound YAML"),
        pytest.param("[" * 3000, r"run_config\.yaml: not sound YAML", id="deep"),
        ("train: {}", r"run_config\.yaml: has no model section"),
        ("- 1", r"run_config\.yaml: has no model section"),
        ("model: 3", r"run_config\.yaml: has no model section"),
    ],
)
def test_a_run_config_without_a_model_is_refused(
    text: str, says: str, state: SimpleNamespace, save_torch_dist: Save, tmp_path: Path
) -> None:
    folder = save_torch_dist("m", state.megatron)
    (folder / "run_config.yaml").write_text(text)
    with pytest.raises(FormatError, match=says):
        export_checkpoint(folder, tmp_path / "hf")


def test_another_models_settings_are_refused(
    state: SimpleNamespace, save_torch_dist: Save, tmp_path: Path
) -> None:
    folder = save_torch_dist("m", state.megatron)
    args = state.bridge.megatron_args(101, "float32") | {"normalization": "LayerNorm"}
    torch.save({"args": argparse.Namespace(**args)}, folder / "common.pt")
    with pytest.raises(UnsupportedError, match="normalization='LayerNorm'"):
        export_checkpoint(folder, tmp_path / "hf")


def test_a_post_norm_in_place_of_a_pre_norm_is_refused(
    state: SimpleNamespace, save_torch_dist: Save, make_hf: HF, tmp_path: Path
) -> None:
    right = "decoder.layers.mlp.linear_fc2.post_layernorm.weight"
    wrong = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    state.megatron[wrong] = state.megatron.pop(right)
    folder = save_torch_dist("m", state.megatron)
    with pytest.raises(MappingError) as caught:
        export_checkpoint(folder, tmp_path / "back", ExportOptions(hf_config=make_hf()))
    assert f"missing (1):\n  - {right}" in str(caught.value)
    assert f"unexpected (1):\n  - {wrong}" in str(caught.value)


def test_all_iterations_are_exported(make_hf: HF, tmp_path: Path) -> None:
    a, b = make_hf("a", seed=1), make_hf("b", seed=2)
    import_checkpoint(a, tmp_path / "m")
    import_checkpoint(b, tmp_path / "r", ImportOptions(release=True))
    shutil.move(tmp_path / "r/release", tmp_path / "m/release")
    shutil.copytree(tmp_path / "m/release", tmp_path / "m/iter_0000012")
    plans = export_checkpoint(tmp_path / "m", tmp_path / "all", ExportOptions(iteration="all"))
    assert len(plans) == 3
    names = ["iter_0000000", "iter_0000012", "release"]
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == names
    for name, source in zip(names, (a, b, b), strict=True):
        assert same(load(tmp_path / "all" / name), load(source))


def test_one_iteration_of_several_is_exported(make_hf: HF, tmp_path: Path) -> None:
    a, b = make_hf("a", seed=1), make_hf("b", seed=2)
    import_checkpoint(a, tmp_path / "m")
    import_checkpoint(b, tmp_path / "r")
    shutil.move(tmp_path / "r/iter_0000000", tmp_path / "m/iter_0000012")
    for iteration, source in ((12, b), ("0", a), (None, a)):
        exports = plan_exports(tmp_path / "m", tmp_path / "x", ExportOptions(iteration=iteration))
        ((_, provenance, _),) = exports.plans
        assert provenance.source.endswith("iter_0000012" if source is b else "iter_0000000")
    export_checkpoint(tmp_path / "m", tmp_path / "x", ExportOptions(iteration=12))
    assert same(load(tmp_path / "x"), load(b))


def test_what_is_not_a_source_is_refused(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    with pytest.raises(InputError, match="is a Hugging Face checkpoint already"):
        plan_exports(hf, tmp_path / "x")
    with pytest.raises(InputError, match="has no iter_ folders"):
        plan_exports(hf, tmp_path / "x", ExportOptions(iteration="all"))
    with pytest.raises(InputError, match="has no iter_ folders"):
        plan_exports(tmp_path / "absent", tmp_path / "x", ExportOptions(iteration="all"))
    with pytest.raises(InputError, match="dtype 'int8' is not one of"):
        plan_exports(hf, tmp_path / "x", ExportOptions(dtype="int8"))
