"""Inspect: what a checkpoint is, from its headers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.convert.options import ImportOptions
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.tools.inspect import inspect

HF = Callable[..., Path]


def count_tiny() -> int:
    hidden, kv, ffn, vocab, layers = 128, 64, 384, 1024, 4
    attention = 2 * hidden * hidden + 2 * kv * hidden + hidden + kv
    return 2 * vocab * hidden + hidden + layers * (attention + 3 * ffn * hidden + 2 * hidden)


def test_a_hugging_face_checkpoint_is_described(tiny_hf: Path) -> None:
    found = inspect(tiny_hf)
    assert (found.kind, found.family, found.size) == ("Hugging Face", "olmo2", "olmo2-tiny")
    assert found.parameters == count_tiny()
    assert found.dtypes == ["bfloat16"]
    assert found.layout == f"{len(list(tiny_hf.glob('*.safetensors')))} safetensors file(s)"
    assert found.iterations == []
    assert (found.vocab_size, found.padded_vocab_size) == (1024, 1024)
    assert found.numbers["num_query_groups"] == 4
    assert found.files == {p.name: p.stat().st_size for p in sorted(tiny_hf.iterdir())}
    assert found.nbytes == sum(found.files.values())
    assert found.provenance is None
    assert {t["name"]: (t["shape"], t["dtype"]) for t in found.tensors}["model.norm.weight"] == (
        [128], "bfloat16"
    )  # fmt: skip
    assert len(found.tensors) == 3 + 4 * 11


def test_a_megatron_checkpoint_is_described(tiny_hf: Path, tiny_megatron: Path) -> None:
    found = inspect(tiny_megatron)
    assert (found.kind, found.size) == ("Megatron torch_dist", "olmo2-tiny")
    assert found.folder == str(tiny_megatron / "iter_0000000")
    assert found.parameters == count_tiny()
    assert found.iterations == ["iter_0000000"]
    assert found.layout == "layers stacked in one key, tensors in up to 2 chunk(s)"
    assert found.config_from == str(tiny_megatron / "iter_0000000/hf/config.json")
    assert found.provenance is not None
    assert found.provenance["source"] == str(tiny_hf.resolve())
    assert "hf/config.json" in found.files
    assert "--bf16" in found.megatron_flags
    pieces = {t["name"]: t["pieces"] for t in found.tensors}
    assert pieces["decoder.layers.3.mlp.linear_fc1.weight"] == 2


def test_the_mapping_row_by_row(tiny_megatron: Path) -> None:
    rows = inspect(tiny_megatron).mapping
    qkv = [r for r in rows if r["megatron"] == "decoder.layers.*.self_attention.linear_qkv.weight"]
    attention = "model.layers.*.self_attn"
    assert [(r["block"], r["hf"], r["hf_block"]) for r in qkv[:4]] == [
        ("[0:32, 0:128]", f"{attention}.q_proj.weight", "[0:32, 0:128]"),
        ("[32:48, 0:128]", f"{attention}.k_proj.weight", "[0:16, 0:128]"),
        ("[48:64, 0:128]", f"{attention}.v_proj.weight", "[0:16, 0:128]"),
        ("[64:96, 0:128]", f"{attention}.q_proj.weight", "[32:64, 0:128]"),
    ]
    assert len(qkv) == 4 * 3
    norm = next(r for r in rows if r["megatron"] == "decoder.final_layernorm.weight")
    assert (norm["block"], norm["hf"]) == ("[0:128]", "model.norm.weight")
    assert rows[-1]["hf"] == "*rotary_emb.inv_freq"
    assert rows[-1]["block"].startswith("ignored: ")
    assert not [r for r in rows if ".1." in r["megatron"]]


def test_padding_rows_are_listed(make_hf: HF, tmp_path: Path) -> None:
    import_checkpoint(make_hf(), tmp_path / "m", ImportOptions(make_vocab_size_divisible_by=128))
    found = inspect(tmp_path / "m")
    assert (found.vocab_size, found.padded_vocab_size, found.size) == (101, 128, None)
    zeros = [(r["megatron"], r["block"]) for r in found.mapping if r["hf"] == "zeros"]
    assert zeros == [
        ("embedding.word_embeddings.weight", "[101:128, 0:36]"),
        ("output_layer.weight", "[101:128, 0:36]"),
    ]


def test_a_checkpoint_of_a_training_run_is_described(
    make_hf: HF, save_torch_dist: Callable[..., Path], reference: SimpleNamespace
) -> None:
    tensors = reference.state_dict(reference.config, torch.float32, 0)
    parameters = reference.parameters(tensors, reference.config)
    folder = save_torch_dist("m", parameters | {"optimizer.state.step": torch.zeros(3)})
    found = inspect(folder, ReadOptions(hf_config=make_hf()))
    assert found.layout == (
        "a key for each layer, tensors in up to 1 chunk(s), 1 tensors of optimizer state"
    )


def test_megatron_lms_flags_load_the_checkpoint(tiny_megatron: Path, tmp_path: Path) -> None:
    def load_flags(path: Path, **options: Any) -> list[str]:
        flags = inspect(path, ReadOptions(**options)).megatron_flags
        return flags[flags.index("--load") :]

    root = tmp_path / "m"
    for number in (3, 20):
        shutil.copytree(tiny_megatron / "iter_0000000", root / f"iter_{number:07d}")
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    assert load_flags(root) == ["--load", str(root)]
    assert load_flags(root / "iter_0000020") == ["--load", str(root)]
    assert load_flags(root, iteration=3) == ["--load", str(root), "--ckpt-step", "3"]


def test_megatron_lms_flags_of_a_hugging_face_checkpoint_load_nothing(tiny_hf: Path) -> None:
    assert "--load" not in inspect(tiny_hf).megatron_flags
