"""Import: what torch itself reads from the result is what was in the Hugging Face folder."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_olmo_bridge.convert.options import ImportOptions
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint, plan_import
from megatron_olmo_bridge.errors import FormatError, InputError, MappingError
from megatron_olmo_bridge.formats.torch_archive import read_archive
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder
from megatron_olmo_bridge.storage.execute import WriteOptions

HF = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> Tensors:
    """Every tensor of a distributed checkpoint, by torch's own reader."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        key: torch.full(described.size, torch.nan, dtype=described.properties.dtype)
        for key, described in reader.read_metadata().state_dict_metadata.items()
        if isinstance(described, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def expected(hf: Path, reference: SimpleNamespace, **config: Any) -> Tensors:
    config = reference.config | config
    tensors = load_file(hf / "model.safetensors")
    return reference.stacked(reference.parameters(tensors, config), config)


def same(a: Tensors, b: Tensors) -> bool:
    assert a.keys() == b.keys()
    assert {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
    return all(torch.equal(a[name], b[name]) for name in a)


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_reads_the_weights(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace, dtype: torch.dtype
) -> None:
    hf = make_hf(dtype=dtype)
    import_checkpoint(hf, tmp_path / "m")
    assert same(load(tmp_path / "m/iter_0000000"), expected(hf, reference))


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_the_dtype_can_be_changed(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace, target: str
) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "m", ImportOptions(dtype=target))
    cast = {n: t.to(getattr(torch, target)) for n, t in expected(hf, reference).items()}
    assert same(load(tmp_path / "m/iter_0000000"), cast)
    config = json.loads((tmp_path / "m/iter_0000000/hf/config.json").read_text())
    assert config["torch_dtype"] == target
    args = TorchDistFolder.read(tmp_path / "m/iter_0000000").args
    assert args is not None
    assert (args["bf16"], args["fp16"]) == (target == "bfloat16", target == "float16")


def test_a_padded_vocabulary_ends_in_zeros(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace
) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "m", ImportOptions(make_vocab_size_divisible_by=64))
    padded = expected(hf, reference)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded[name] = torch.cat([padded[name], torch.zeros(27, 36)])
    assert same(load(tmp_path / "m/iter_0000000"), padded)
    run_config = yaml.safe_load((tmp_path / "m/iter_0000000/run_config.yaml").read_text())
    assert run_config["model"]["make_vocab_size_divisible_by"] == 128
    assert run_config["model"]["vocab_size"] == 101


def test_tied_embeddings_have_no_output_layer(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace
) -> None:
    hf = make_hf(tie_word_embeddings=True)
    import_checkpoint(hf, tmp_path / "m")
    loaded = load(tmp_path / "m/iter_0000000")
    assert "output_layer.weight" not in loaded
    assert same(loaded, expected(hf, reference, tie_word_embeddings=True))


def test_ignored_tensors_are_left_out(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace
) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    hf = make_hf(tie_word_embeddings=True, change=change)
    import_checkpoint(hf, tmp_path / "m")
    assert "output_layer.weight" not in load(tmp_path / "m/iter_0000000")


def test_the_folder_of_an_import_has_these_files(make_hf: HF, tmp_path: Path) -> None:
    import_checkpoint(make_hf(), tmp_path / "m")
    assert sorted(files(tmp_path / "m")) == [
        "iter_0000000/.metadata",
        "iter_0000000/__0_0.distcp",
        "iter_0000000/common.pt",
        "iter_0000000/hf/config.json",
        "iter_0000000/hf/generation_config.json",
        "iter_0000000/hf/tokenizer.json",
        "iter_0000000/metadata.json",
        "iter_0000000/olmo_bridge.json",
        "iter_0000000/run_config.yaml",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "m/latest_checkpointed_iteration.txt").read_text() == "0"
    assert json.loads((tmp_path / "m/iter_0000000/metadata.json").read_text()) == {
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1,
    }  # fmt: skip


def test_a_release_differs_only_in_its_name(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "m")
    import_checkpoint(hf, tmp_path / "r", ImportOptions(release=True))
    assert (tmp_path / "r/latest_checkpointed_iteration.txt").read_text() == "release"
    ours, theirs = files(tmp_path / "m/iter_0000000"), files(tmp_path / "r/release")
    del ours["olmo_bridge.json"], theirs["olmo_bridge.json"]
    assert ours == theirs


def test_the_common_state_is_plain(make_hf: HF, tmp_path: Path) -> None:
    import_checkpoint(make_hf(), tmp_path / "m")
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(tmp_path / "m/iter_0000000/common.pt", weights_only=True)
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)
    assert common["args"].hidden_size == 36
    assert not common["content_metadata"]["singleton_local_shards"]


def test_each_extra_state_is_an_empty_list(make_hf: HF, tmp_path: Path) -> None:
    import_checkpoint(make_hf(), tmp_path / "m")
    folder = TorchDistFolder.read(tmp_path / "m/iter_0000000")
    assert len(folder.objects) == 6 * 3 + 1
    for key, at in folder.objects.items():
        assert "._extra_state/shard_" in key
        assert read_archive(folder.path / at.file, at.offset, at.length) == [None]
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_2_3" in folder.objects
    assert "decoder.final_layernorm._extra_state/shard_0_1" in folder.objects


def test_gate_and_up_are_chunks_of_their_own(make_hf: HF, tmp_path: Path) -> None:
    import_checkpoint(make_hf(), tmp_path / "m")
    fc1 = TorchDistFolder.read(tmp_path / "m/iter_0000000").tensors[
        "decoder.layers.mlp.linear_fc1.weight"
    ]
    assert fc1.shape == (3, 100, 36)
    assert {(c.offset, c.shape) for c in fc1.chunks} == {
        ((layer, row, 0), (1, 50, 36)) for layer in range(3) for row in (0, 50)
    }


def test_the_same_source_gives_the_same_bytes(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "a", write=WriteOptions(workers=1))
    import_checkpoint(hf, tmp_path / "b", write=WriteOptions(workers=3))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_several_files_are_written_by_several_workers(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_olmo_bridge.convert.to_megatron.FILE_BYTES", 20_000)
    hf = make_hf()
    plan = import_checkpoint(hf, tmp_path / "a", write=WriteOptions(workers=1))
    import_checkpoint(hf, tmp_path / "b", write=WriteOptions(workers=3))
    assert len(plan.files) > 5
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert same(load(tmp_path / "a/iter_0000000"), expected(hf, reference))


def test_layers_of_different_dtypes_need_a_dtype(make_hf: HF, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    hf = make_hf(change=lambda t: t.update({name: t[name].half()}))
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.linear_fc2\.weight is float16, .*"):
        import_checkpoint(hf, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    import_checkpoint(hf, tmp_path / "m", ImportOptions(dtype="float32"))


MIXED = {
    "model.layers.1.self_attn.q_proj.weight": torch.bfloat16,
    "model.layers.1.self_attn.k_proj.weight": torch.float16,
    "model.layers.0.mlp.up_proj.weight": torch.float16,
    "model.layers.2.self_attn.v_proj.weight": torch.bfloat16,
    "model.norm.weight": torch.bfloat16,
}
"""Tensors of a float32 model to change: one of q, k and v, one of gate and up, a whole one."""


def mix(tensors: Tensors) -> None:
    tensors.update({name: tensors[name].to(dtype) for name, dtype in MIXED.items()})


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_parts_of_one_tensor_may_differ_in_dtype_if_one_is_asked_for(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace, target: str
) -> None:
    hf = make_hf(change=mix)
    import_checkpoint(
        hf,
        tmp_path / "m",
        ImportOptions(dtype=target, make_vocab_size_divisible_by=128),
        WriteOptions(workers=3),
    )
    cast = {n: t.to(getattr(torch, target)) for n, t in load_file(hf / "model.safetensors").items()}
    parameters = reference.stacked(reference.parameters(cast, reference.config), reference.config)
    found = load(tmp_path / "m/iter_0000000")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        found[name] = found[name][:101]
    assert same(found, parameters)


def test_a_block_of_rows_may_hold_parts_of_several_dtypes(
    make_hf: HF, tmp_path: Path, reference: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_olmo_bridge.storage.transfer.BLOCK", 7 * 36 * 4)  # 7 rows
    test_parts_of_one_tensor_may_differ_in_dtype_if_one_is_asked_for(
        make_hf, tmp_path, reference, "float32"
    )


def test_parts_of_different_dtypes_need_a_dtype(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf(change=mix)
    with pytest.raises(FormatError, match=r"mlp.linear_fc1.weight are .*\. Pass --dtype"):
        import_checkpoint(hf, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_value_too_large_leaves_nothing_behind(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf(change=lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(InputError, match="36 values are too large for float16"):
        import_checkpoint(hf, tmp_path / "m", ImportOptions(dtype="float16"))
    assert not (tmp_path / "m").exists()


def test_what_is_not_a_source_is_refused(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    with pytest.raises(InputError, match="dtype 'float64' is not one of keep, float32"):
        plan_import(hf, ImportOptions(dtype="float64"))
    with pytest.raises(InputError, match="make-vocab-size-divisible-by must be at least 1"):
        plan_import(hf, ImportOptions(make_vocab_size_divisible_by=0))
    with pytest.raises(InputError, match="no such folder, and not a hub id"):
        plan_import(tmp_path / "absent")
    with pytest.raises(InputError, match="is a path; --revision is for a hub id"):
        plan_import(hf, ImportOptions(revision="main"))
    import_checkpoint(hf, tmp_path / "m")
    with pytest.raises(InputError, match="is a Megatron checkpoint already"):
        plan_import(tmp_path / "m")


def test_tensors_that_are_not_the_configs_are_refused(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf(change=lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"))
    with pytest.raises(MappingError, match=r"missing \(1\):\n  - model\.layers\.1\.self_attn"):
        import_checkpoint(hf, tmp_path / "m")


def test_progress_ends_at_the_source_bytes(make_hf: HF, tmp_path: Path) -> None:
    from megatron_olmo_bridge.storage.progress import Reporter

    class Counter(Reporter):
        total = done = 0
        said = ""

        def begin(self, what: str, total: int) -> None:
            self.said, self.total = what, total

        def advance(self, done: int) -> None:
            self.done += done

    counter = Counter()
    plan = import_checkpoint(make_hf(), tmp_path / "m", reporter=counter)
    assert counter.said == "importing"
    assert counter.done == counter.total == plan.source_bytes
