"""Bad input is refused with one message that names file and tensor, exit code 2, nothing changed.

The table below is the specification. Each case damages a copy of a valid checkpoint, or builds a
folder that is not one; then every command that would read it runs on it.
"""

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damage import (
    ITERATION,
    calling,
    edit_header,
    edit_json,
    edit_metadata,
    edit_stored,
    edit_tensor_metadata,
    edit_tensors,
    header_text,
    rename_key,
    replace_header,
    write,
    write_archive,
)
from trees import tree_hash
from typer.testing import CliRunner, Result

from megatron_olmo_bridge.cli.app import app

SCREEN = 24
"""Maximum number of lines of a message."""
ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TENSOR = "model.layers.1.mlp.up_proj.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
POST_NORM = "decoder.layers.mlp.linear_fc2.post_layernorm.weight"
TRACKER = "latest_checkpointed_iteration.txt"
SENTINEL = "the-pickle-was-run"

IMPORT, EXPORT = "import SRC DST", "export SRC DST"
LOOK = ("verify SRC GOOD", "verify GOOD SRC", "inspect SRC")
READ_HF, READ_MEGATRON = (IMPORT, *LOOK), (EXPORT, *LOOK)
READ_ANY = (IMPORT, EXPORT, *LOOK)


@dataclass(frozen=True)
class Case:
    """A bad input, the commands that must refuse it, and what their message must contain."""

    id: str
    start: str
    """Fixture of the valid checkpoint that is copied to SRC: single, sharded, megatron, or
    nothing."""
    damage: Callable[[Path], object]
    """Called with SRC. DST is ``../out/dst`` relative to it."""
    says: tuple[str, ...]
    commands: tuple[str, ...] = ()
    differs: bool = False
    """Whether ``verify`` reports a difference, exit code 1: valid files of another model."""


def leave(_: Path) -> None: ...


# ------------------------------------------------------------------ Hugging Face: headers, one file


def entry(**changes: Any) -> Callable[[Path], None]:
    """Change a tensor's entry in the header."""
    return lambda src: edit_header(src / ONE, lambda header: header[TENSOR].update(changes))


def moved(by: int) -> Callable[[Path], None]:
    def move(header: dict[str, Any]) -> None:
        header[TENSOR]["data_offsets"] = [at + by for at in header[TENSOR]["data_offsets"]]

    return lambda src: edit_header(src / ONE, move)


def last_tensor_beyond_the_end(src: Path) -> None:
    def grow(header: dict[str, Any]) -> None:
        head = header["lm_head.weight"]
        begin, end = head["data_offsets"]
        head["shape"][0] *= 2
        head["data_offsets"] = [begin, 2 * end - begin]

    edit_header(src / ONE, grow)


def same_key_twice(src: Path) -> None:
    text = header_text(src / ONE).rstrip()
    again = json.dumps(json.loads(text)[TENSOR])
    replace_header(src / ONE, f'{text[:-1]},"{TENSOR}":{again}}}')


def truncated(name: str, by: int = 100) -> Callable[[Path], None]:
    return lambda src: os.truncate(src / name, (src / name).stat().st_size - by)


def appended(src: Path) -> None:
    with (src / ONE).open("ab") as file:
        file.write(b"more")


HEADERS = [
    Case("truncated", "single", truncated(ONE), (ONE, "truncated", "lm_head.weight")),
    Case("header-beyond-the-file", "single",
         lambda src: write(src / ONE, struct.pack("<Q", 10**6) + b"{}"),
         (ONE, "header would be 1000000 bytes")),
    Case("header-of-many-exabytes", "single",
         lambda src: write(src / ONE, b"\xff" * 8 + b"{}"), (ONE, "not a safetensors file")),
    Case("seven-bytes", "single", lambda src: write(src / ONE, b"7 bytes"), (ONE, "7 bytes")),
    Case("empty-file", "single", lambda src: write(src / ONE), (ONE, "0 bytes")),
    Case("header-no-json", "single", lambda src: replace_header(src / ONE, "{nonsense"),
         (ONE, "not sound JSON")),
    Case("header-no-text", "single", lambda src: write(src / ONE, struct.pack("<Q", 2) + b"\xff{"),
         (ONE, "not sound JSON")),
    Case("header-no-object", "single", lambda src: replace_header(src / ONE, "[1, 2]"),
         (ONE, "not sound JSON", "object")),
    Case("header-too-deep", "single", lambda src: replace_header(src / ONE, "[" * 100_000),
         (ONE, "not sound JSON")),
    Case("same-key-twice", "single", same_key_twice, (ONE, TENSOR, "twice")),
    Case("overlapping-offsets", "single", moved(-2), (ONE, TENSOR, "overlaps")),
    Case("gapped-offsets", "single", moved(2), (ONE, TENSOR, "gap")),
    Case("offsets-out-of-range", "single", last_tensor_beyond_the_end,
         (ONE, "lm_head.weight", "truncated")),
    Case("offsets-far-out-of-range", "single", moved(1 << 62), (ONE, TENSOR, "truncated")),
    Case("bytes-after-the-last-tensor", "single", appended, (ONE, "after its last tensor")),
    Case("negative-offsets", "single", entry(data_offsets=[-4, -2]), (ONE, TENSOR, "whole")),
    Case("offsets-of-text", "single", entry(data_offsets=["a", "b"]), (ONE, TENSOR, "whole")),
    Case("one-offset", "single", entry(data_offsets=[0]), (ONE, TENSOR, "not sound")),
    Case("no-dtype", "single",
         lambda src: edit_header(src / ONE, lambda header: header[TENSOR].pop("dtype")),
         (ONE, TENSOR, "not sound")),
    Case("entry-no-object", "single",
         lambda src: edit_header(src / ONE, lambda header: header.update({TENSOR: 3})),
         (ONE, TENSOR, "not sound")),
    Case("offsets-that-do-not-fit-the-shape", "single", entry(shape=[384, 127]),
         (ONE, TENSOR, "[384, 127]")),
    Case("unknown-dtype", "single", entry(dtype="F7"), (ONE, TENSOR, "unknown dtype 'F7'")),
    Case("dtype-no-text", "single", entry(dtype=["BF16"]), (ONE, TENSOR, "unknown dtype")),
    Case("double-precision", "single", entry(dtype="F64"), (ONE, TENSOR, "F64", "BF16")),
    *(
        Case(f"quantized-{dtype}", "single", entry(dtype=dtype),
             (ONE, TENSOR, dtype, "quantized", "unquantized checkpoint"))
        for dtype in ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")
    ),
]  # fmt: skip


# ---------------------------------------------------------------- Hugging Face: index and shards


def shard(src: Path) -> str:
    """Return the shard that holds TENSOR."""
    return str(json.loads((src / INDEX).read_text())["weight_map"][TENSOR])


def indexed(file: object) -> Callable[[Path], None]:
    """Make the index name another file for TENSOR."""
    return lambda src: edit_json(src / INDEX, lambda x: x["weight_map"].update({TENSOR: file}))


def shard_truncated(src: Path) -> None:
    os.truncate(src / shard(src), (src / shard(src)).stat().st_size // 2)


def shard_twice(src: Path) -> None:
    shutil.copy(src / shard(src), src / "model-copy.safetensors")
    (src / INDEX).unlink()


LAST_SHARD = "model-00004-of-00004.safetensors"
INDEXES = [
    Case("shard-truncated", "sharded", shard_truncated,
         ("model-0000", "truncated", "tensor model")),
    Case("shard-absent", "sharded", lambda src: (src / shard(src)).unlink(), (INDEX, "absent")),
    Case("index-names-a-file-above", "sharded", indexed("../x.safetensors"),
         (INDEX, TENSOR, "'../x.safetensors'", "not a file of this folder")),
    Case("index-names-an-absolute-path", "sharded", indexed("/etc/passwd"),
         (INDEX, TENSOR, "'/etc/passwd'", "not a file of this folder")),
    Case("index-names-the-folder", "sharded", indexed(".."), (INDEX, TENSOR, "not a file")),
    Case("index-names-a-number", "sharded", indexed(3), (INDEX, TENSOR, "not a file")),
    Case("index-names-an-absent-file", "sharded", indexed("none.safetensors"),
         (INDEX, "none.safetensors", "absent")),
    Case("tensor-in-another-shard", "sharded", indexed(LAST_SHARD), (INDEX, TENSOR, LAST_SHARD)),
    Case("tensor-not-in-the-index", "sharded",
         lambda src: edit_json(src / INDEX, lambda x: x["weight_map"].pop(TENSOR)),
         (INDEX, TENSOR, "nowhere")),
    Case("tensor-in-the-index-only", "sharded",
         lambda src: edit_json(
             src / INDEX, lambda x: x["weight_map"].update({"model.extra": LAST_SHARD})),
         (INDEX, "model.extra", LAST_SHARD)),
    Case("index-no-json", "sharded", lambda src: write(src / INDEX, "{"), (INDEX, "JSON")),
    Case("index-no-object", "sharded", lambda src: write(src / INDEX, "[]"), (INDEX, "object")),
    Case("index-without-map", "sharded", lambda src: write(src / INDEX, "{}"),
         (INDEX, "weight_map")),
    Case("one-file-and-an-index", "sharded",
         lambda src: shutil.copy(src / shard(src), src / ONE), (ONE, INDEX, "both")),
    Case("tensor-in-two-shards", "sharded", shard_twice,
         ("model-copy.safetensors", "stands in model-0000")),
]  # fmt: skip


# ------------------------------------------------------------ Hugging Face: tensors and the config


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda src: edit_tensors(src / ONE, change)


def without(pattern: str) -> Callable[[dict[str, Any]], None]:
    def drop(found: dict[str, Any]) -> None:
        for name in [n for n in found if re.search(pattern, n)]:
            del found[name]

    return drop


def all_kinds_of_faults(found: dict[str, Any]) -> None:
    for name in list(found):
        if "q_proj" in name or "o_proj" in name or "q_norm" in name:
            found[name.replace("layers", "blocks")] = found.pop(name)
        elif "layers" in name:
            found[name] = found[name][:2]


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda src: edit_json(src / "config.json", lambda x: x.update(changes))


TENSORS = [
    Case("missing-tensor", "single", tensors(without(TENSOR)), ("missing", TENSOR), differs=True),
    Case("unexpected-tensor", "single",
         tensors(lambda x: x.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)})),
         ("unexpected", "model.layers.0.self_attn.q_proj.bias"), differs=True),
    Case("wrong-shape", "single", tensors(lambda x: x.update({TENSOR: x[TENSOR][:-1]})),
         ("shape", TENSOR, "[383, 128]", "[384, 128]"), differs=True),
    Case("transposed", "single", tensors(lambda x: x.update({TENSOR: x[TENSOR].T})),
         ("shape", TENSOR, "[128, 384]", "[384, 128]"), differs=True),
    Case("layer-missing-in-the-middle", "single", tensors(without(r"layers\.2\.")),
         ("missing", "model.layers.2.self_attn.q_proj.weight"), differs=True),
    Case("many-faults-of-all-kinds", "single", tensors(all_kinds_of_faults),
         ("missing", "unexpected", "shape", "model.blocks.0.self_attn.q_proj.weight"),
         differs=True),
    Case("layers-of-different-dtypes", "single",
         tensors(lambda x: x.update({TENSOR.replace("up", "down"): torch.zeros(128, 384)})),
         ("decoder.layers.1.mlp.linear_fc2.weight", "float32", "bfloat16", "--dtype"), (IMPORT,)),
    Case("parts-of-different-dtypes", "single",
         tensors(lambda x: x.update({TENSOR: x[TENSOR].float()})),
         ("decoder.layers.1.mlp.linear_fc1.weight", "bfloat16", "float32"), (IMPORT,)),
    Case("too-large-for-float16", "single",
         tensors(lambda x: x.update({TENSOR: x[TENSOR].fill_(1e30)})),
         (ONE, "decoder.layers.1.mlp.linear_fc1.weight", "too large for float16",
          "--dtype bfloat16"), (f"{IMPORT} --dtype float16",)),
]  # fmt: skip

CONFIGS = [
    Case("no-config", "single", lambda src: (src / "config.json").unlink(), ("no config.json",)),
    Case("config-no-json", "single", lambda src: write(src / "config.json", "{'a': 1}"),
         ("config.json", "JSON")),
    Case("config-no-object", "single", lambda src: write(src / "config.json", "3"),
         ("config.json", "not hold a JSON object")),
    Case("config-no-text", "single", lambda src: write(src / "config.json", b"\xff\xfe"),
         ("config.json", "JSON")),
    Case("unknown-architecture", "single", config(architectures=["LlamaForCausalLM"]),
         ("config.json", "LlamaForCausalLM", "Known are: Olmo2ForCausalLM")),
    Case("architecture-no-list", "single", config(architectures="GPT2"), ("config.json", "GPT2")),
    Case("unknown-model-type", "single", config(architectures=None, model_type="llama"),
         ("config.json", "llama", "Known are: Olmo2ForCausalLM")),
    Case("number-absent", "single", config(hidden_size=None), ("config.json", "hidden_size")),
    Case("number-as-text", "single", config(hidden_size="128"),
         ("config.json", "hidden_size", '"128"')),
    Case("number-negative", "single", config(num_hidden_layers=-1), ("config.json", "-1")),
    Case("number-no-number", "single", config(rms_norm_eps="tiny"), ("config.json", "tiny")),
    Case("heads-that-do-not-divide", "single", config(num_attention_heads=7),
         ("config.json", "128 cannot be divided by 7")),
    Case("kv-heads-that-do-not-divide", "single", config(num_key_value_heads=3),
         ("config.json", "8 attention heads", "3 key/value heads")),
    Case("attention-bias", "single", config(attention_bias=True),
         ("config.json", "attention_bias")),
    Case("scaled-rope", "single", config(rope_scaling={"rope_type": "yarn", "factor": 4}),
         ("config.json", "'yarn'")),
    Case("rope-no-object", "single", config(rope_scaling=[1]), ("config.json",)),
    Case("more-layers-than-there-are", "single", config(num_hidden_layers=5),
         ("missing", "model.layers.4."), (IMPORT, "inspect SRC")),
    Case("quantized", "single", config(quantization_config={"quant_method": "gptq"}),
         ("config.json", "quantized", "gptq", "unquantized checkpoint")),
    Case("quantized-somehow", "single", config(quantization_config="int4"),
         ("config.json", "quantized", "int4")),
]  # fmt: skip


# ------------------------------------------------------------------- what is not a checkpoint


def bin_files(src: Path) -> None:
    (src / ONE).rename(src / "pytorch_model.bin")


def lora_adapter(src: Path) -> None:
    write(src / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x/y"})
    write(src / "adapter_model.safetensors", struct.pack("<Q", 2) + b"{}")


def as_iteration(**files: str) -> Callable[[Path], None]:
    """Build a Megatron root whose iteration holds these files; ``_dot_`` in a name is a dot."""

    def build(src: Path) -> None:
        write(src / TRACKER, "10")
        for name, content in files.items():
            name = name.replace("_dot_", ".").replace("_in_", "/")
            write(src / "iter_0000010" / name, content)

    return build


OTHER_FORMATS = [
    Case("missing-path", "", lambda src: src.rmdir(), ("SRC", "no such"), READ_ANY),
    Case("a-file", "", lambda src: (src.rmdir(), write(src)), ("SRC", "is a file"), READ_ANY),
    Case("an-empty-folder", "", leave, ("SRC", "not a checkpoint"), READ_ANY),
    Case("other-files", "", lambda src: write(src / "model.py"), ("SRC", "not a checkpoint"),
         READ_ANY),
    Case("config-only", "", lambda src: write(src / "config.json", {}), ("SRC", "no safetensors"),
         READ_ANY),
    Case("lora-adapter", "", lora_adapter, ("SRC", "LoRA", "merge_and_unload"), READ_ANY),
    Case("lora-adapter-beside-a-model", "single", lora_adapter, ("LoRA", "merge_and_unload")),
    Case("bin-file", "single", bin_files, ("pytorch_model.bin", "pickles", "save_pretrained")),
    Case("bin-shards", "", lambda src: write(src / "pytorch_model-00001-of-00002.bin"),
         ("pytorch_model-00001-of-00002.bin", "pickles", "save_pretrained"), READ_ANY),
    Case("megatron-legacy", "", as_iteration(mp_rank_00_in_model_optim_rng_dot_pt=""),
         ("iter_0000010", "legacy", "mp_rank_00", "--ckpt-convert-format torch_dist"), READ_ANY),
    Case("megatron-legacy-rank", "",
         as_iteration(mp_rank_00_000_in_model_optim_rng_dot_pt=""),
         ("legacy", "mp_rank_00_000", "torch_dist"), ("inspect SRC/iter_0000010/mp_rank_00_000",)),
    Case("megatron-torch-dcp", "", as_iteration(_dot_metadata="x", __0_0_dot_distcp="x"),
         ("iter_0000010", "torch_dcp", "torch_dist"), READ_ANY),
    Case("megatron-torch-dcp-iteration", "", as_iteration(_dot_metadata="x"),
         ("iter_0000010", "torch_dcp", "torch_dist"), ("inspect SRC/iter_0000010",)),
    Case("megatron-fsdp-dtensor", "",
         as_iteration(_dot_metadata="x", metadata_dot_json='{"sharded_backend": "fsdp_dtensor"}'),
         ("iter_0000010", "fsdp_dtensor", "torch_dist"), READ_ANY),
    Case("megatron-fsdp-dtensor-without-format", "",
         as_iteration(_dot_metadata="x", train_state_dot_pt="x"),
         ("iter_0000010", "fsdp_dtensor", "torch_dist"), READ_ANY),
    Case("megatron-zarr", "", as_iteration(metadata_dot_json='{"sharded_backend": "zarr"}'),
         ("iter_0000010", "zarr", "torch_dist"), READ_ANY),
]  # fmt: skip


# ------------------------------------------------------------------------ Megatron: damaged or odd


def inside(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda src: write(src / ITERATION / name, content)


def removed(*names: str) -> Callable[[Path], None]:
    return lambda src: [(src / name).unlink() for name in names] and None


def described(key: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda src: edit_tensor_metadata(src, key, change)


def sized(key: str, *size: int) -> Callable[[Path], None]:
    return described(key, lambda x: setattr(x["size"], "args", (size,)))


def stored(key: str, **changes: object) -> Callable[[Path], None]:
    return lambda src: edit_stored(src, key, lambda at: at.update(changes))


def routed(new: str) -> Callable[[Path], None]:
    """Store the norm after the MLP under the key of a norm before a layer."""
    return lambda src: rename_key(src, POST_NORM, new)


def layer_lost(tensor: dict[str, Any]) -> None:
    tensor["chunks"] = [c for c in tensor["chunks"] if c.state["offsets"].args[0][0] != 2]


def chunk_twice(tensor: dict[str, Any]) -> None:
    tensor["chunks"].append(tensor["chunks"][0])


def chunk_of_other_shape(tensor: dict[str, Any]) -> None:
    tensor["chunks"][0].state["sizes"].args = ((1, 128, 383),)


def storage_lost(metadata: dict[str, Any]) -> None:
    index = next(i for i in metadata["storage_data"] if i.state["fqn"] == FC2)
    del metadata["storage_data"][index]


def unknown_model(src: Path) -> None:
    removed(f"{ITERATION}/hf/config.json", f"{ITERATION}/run_config.yaml")(src)
    (src / ITERATION / "common.pt").unlink()


def run_config_only(content: str) -> Callable[[Path], None]:
    def damage(src: Path) -> None:
        (src / ITERATION / "hf" / "config.json").unlink()
        write(src / ITERATION / "run_config.yaml", content)

    return damage


DISTCP, META = "__0_0.distcp", ".metadata"
MEGATRON = [
    Case("distcp-absent", "megatron", removed(f"{ITERATION}/{DISTCP}"), (DISTCP, "absent")),
    Case("distcp-truncated", "megatron", truncated(f"{ITERATION}/{DISTCP}", 200_000),
         (DISTCP, "decoder.", "truncated")),
    Case("distcp-truncated-after-the-weights", "megatron", truncated(f"{ITERATION}/{DISTCP}"),
         (DISTCP, "_extra_state", "truncated")),
    Case("distcp-overwritten", "megatron", inside(DISTCP, b"\0" * 3_000_000),
         (DISTCP, "embedding.word_embeddings.weight", "not an archive of torch.save")),
    Case("metadata-absent", "megatron", removed(f"{ITERATION}/{META}"), (META, "incomplete")),
    Case("metadata-truncated", "megatron", truncated(f"{ITERATION}/{META}"), (META, "pickle")),
    Case("metadata-of-something-else", "megatron", inside(META, b"\x80\x02]."),
         (META, "not the metadata")),
    Case("metadata-without-fields", "megatron",
         lambda src: edit_metadata(src, lambda x: x["state_dict_metadata"][FC2].state.clear()),
         (META, "not the metadata")),
    Case("format-empty", "megatron", inside("metadata.json", ""), ("metadata.json", "format")),
    Case("format-without-name", "megatron", inside("metadata.json", "{}"),
         ("metadata.json", "format")),
    Case("format-absent", "megatron", removed(f"{ITERATION}/metadata.json"),
         (ITERATION, "metadata.json")),
    Case("common-truncated", "megatron", truncated(f"{ITERATION}/common.pt"),
         ("common.pt", "not an archive")),
    Case("common-compressed", "megatron",
         lambda src: write_archive(src / ITERATION / "common.pt", b"N.", zipfile.ZIP_DEFLATED),
         ("common.pt", "compressed")),
    Case("common-of-something-else", "megatron",
         lambda src: write_archive(src / ITERATION / "common.pt", b"N."),
         ("common.pt", "not a dictionary")),
    Case("tracker-of-an-absent-iteration", "megatron", lambda src: write(src / TRACKER, "5"),
         ("iter_0000005", f"there: {ITERATION}")),
    Case("tracker-of-text", "megatron", lambda src: write(src / TRACKER, "the last one"),
         ("'the last one' is not an iteration",)),
    Case("tracker-of-bytes", "megatron", lambda src: write(src / TRACKER, b"\xff\x00\x81"),
         ("is not an iteration",)),
    Case("tracker-absent", "megatron", removed(TRACKER), (TRACKER, "--iteration")),
    Case("model-unknown", "megatron", unknown_model, (ITERATION, "--hf-config")),
    Case("run-config-no-yaml", "megatron", run_config_only("a: b: c"), ("run_config.yaml", "YAML")),
    Case("run-config-of-something-else", "megatron", run_config_only("[]"),
         ("run_config.yaml", "no model section")),
    Case("run-config-of-another-model", "megatron", run_config_only("model: {normalization: L1}"),
         ("run_config.yaml", "not OLMo-2's", "L1")),
    Case("run-config-of-nonsense", "megatron",
         run_config_only("model: {hidden_size: a, num_attention_heads: 8, ffn_hidden_size: 1, "
                         "num_layers: 4, vocab_size: x, rotary_base: y, layernorm_epsilon: z, "
                         "seq_length: 1, share_embeddings_and_output_weights: false}"),
         ("run_config.yaml",)),
    Case("vocabulary-too-small", "megatron",
         lambda src: edit_json(src / ITERATION / "hf/config.json",
                               lambda x: x.update(vocab_size=2000)),
         ("1024 rows", "2000", "config.json")),
    Case("layer-lost", "megatron", described(FC2, layer_lost),
         ("decoder.layers.2.mlp.linear_fc2.weight", "not covered")),
    Case("chunk-twice", "megatron", described(FC2, chunk_twice),
         ("decoder.layers.0.mlp.linear_fc2.weight", "covered twice")),
    Case("chunk-of-another-shape", "megatron", described(FC2, chunk_of_other_shape),
         (DISTCP, FC2, "[1, 128, 384]", "[1, 128, 383]")),
    Case("chunk-stored-nowhere", "megatron", lambda src: edit_metadata(src, storage_lost),
         (META, FC2, "does not say where")),
    Case("chunk-outside-the-folder", "megatron", stored(FC2, relative_path="../x.distcp"),
         (META, FC2, "'../x.distcp'", "outside")),
    Case("chunk-after-the-end", "megatron", stored(FC2, offset=1 << 40),
         (DISTCP, FC2, "truncated")),
    Case("chunk-before-the-beginning", "megatron", stored(FC2, offset=-64), (DISTCP, FC2)),
    Case("chunk-at-another-place", "megatron", stored(FC2, offset=64),
         (DISTCP, FC2, "share bytes 568")),
    Case("dimensions-disagree", "megatron", sized(FC2, 4, 128), (META, FC2, "dimensions")),
    Case("stacked-layers-too-many", "megatron", sized(FC2, 5, 128, 384),
         ("shape", FC2, "[5, 128, 384]", "[4, 128, 384]"), differs=True),
    Case("post-norm-stored-as-pre-norm", "megatron",
         routed("decoder.layers.mlp.linear_fc1.layer_norm_weight"),
         ("missing", POST_NORM, "unexpected", "linear_fc1.layer_norm_weight"), differs=True),
    Case("post-norm-stored-as-attention-norm", "megatron",
         routed("decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
         ("missing", POST_NORM, "unexpected", "linear_qkv.layer_norm_weight"), differs=True),
]  # fmt: skip

# None of these pickles may run: each would leave a file. test_hostile_pickles.py has more.
CODE = f"open('{SENTINEL}', 'w').close()"
HOSTILE = [
    Case(f"hostile-{where.strip('.')}-{name}", "megatron", damage, (where, name, "Nothing"))
    for name, pickled in (
        ("os.system", calling("os.system", f"touch {SENTINEL}")),
        ("builtins.eval", calling("builtins.eval", CODE)),
        ("torch.hub.load", calling("torch.hub.load", "someone/repository", "model")),
    )
    for where, damage in (
        (META, inside(META, pickled)),
        ("common.pt",
         lambda src, p=pickled: write_archive(src / ITERATION / "common.pt", p)),
    )
]  # fmt: skip


# ------------------------------------------------------------------------ destinations and options


def there(path: str, content: str | None = None) -> Callable[[Path], None]:
    """Write a file, or a folder with a file, at this path relative to the parent of SRC."""

    def build(src: Path) -> None:
        write(src.parent / path if content is not None else src.parent / path / "x", content or "")

    return build


def linked(src: Path) -> None:
    (src.parent / "link").symlink_to(src)


DESTINATIONS = [
    *(
        case
        for start, command in (("single", "import"), ("megatron", "export"))
        for case in (
            Case(f"{command}-to-what-exists", start, there("../out/dst"), ("DST", "--overwrite"),
                 (f"{command} SRC DST", f"{command} SRC DST --resume")),
            Case(f"{command}-to-a-file", start, there("../out/dst", "x"), ("DST", "is a file"),
                 (f"{command} SRC DST", f"{command} SRC DST --overwrite")),
            Case(f"{command}-under-a-file", start, there("../out/dst", "x"), ("DST", "is a file"),
                 (f"{command} SRC DST/x",)),
            Case(f"{command}-onto-itself", start, leave, ("SRC", "may not be the source"),
                 (f"{command} SRC SRC", f"{command} SRC SRC --overwrite")),
            Case(f"{command}-into-itself", start, leave, ("SRC", "may not be the source"),
                 (f"{command} SRC SRC/x", f"{command} SRC SRC/x/y --overwrite")),
            Case(f"{command}-around-itself", start, leave, ("SRC", "may not be the source"),
                 (f"{command} SRC ABOVE", f"{command} SRC ABOVE --overwrite")),
            Case(f"{command}-onto-itself-by-a-link", start, linked, ("may not be the source",),
                 (f"{command} SRC ABOVE/link --overwrite",)),
            Case(f"{command}-to-the-root", start, leave, ("may not be the source",),
                 (f"{command} SRC / --overwrite",)),
            # This program made neither of these folders, so it deletes neither.
            Case(f"{command}-with-another-partial", start, there("../out/dst.partial"),
                 ("dst.partial", "no conversion made it"),
                 tuple(f"{command} SRC DST {flag}" for flag in ("", "--resume", "--overwrite"))),
            Case(f"{command}-with-another-replaced", start, there("../out/dst.replaced"),
                 ("dst.replaced", "needs this name"),
                 tuple(f"{command} SRC DST {flag}" for flag in ("", "--resume", "--overwrite"))),
        )
    ),
    Case("export-onto-the-iteration", "megatron", leave, ("may not be the source",),
         (f"export SRC SRC/{ITERATION} --overwrite", "export SRC SRC/iter_0000009")),
    Case("synth-to-what-exists", "single", leave, ("SRC", "exists already"),
         ("synth olmo2-tiny SRC", f"synth olmo2-tiny SRC/{ONE}")),
    Case("synth-under-a-file", "single", leave, (ONE, "can't be made"),
         (f"synth olmo2-tiny SRC/{ONE}/x",)),
]  # fmt: skip

OPTIONS = [
    Case("import-dtype", "single", leave, ("int8", "bfloat16"), (f"{IMPORT} --dtype int8",)),
    Case("export-dtype", "megatron", leave, ("int8", "bfloat16"), (f"{EXPORT} --dtype int8",)),
    Case("synth-dtype", "", leave, ("int8", "bfloat16"), ("synth olmo2-tiny DST --dtype int8",)),
    Case("synth-name", "", leave, ("olmo2-3b", "olmo2-tiny"), ("synth olmo2-3b DST",)),
    Case("synth-layers", "", leave, ("--layers",), ("synth olmo2-tiny DST --layers 0",)),
    *(
        Case(f"shard-size-{size}", "megatron", leave, (size, "5GB"),
             (f"{EXPORT} --max-shard-size {size}", f"synth olmo2-tiny DST --max-shard-size {size}"))
        for size in ("banana", "0", "5XB", "GB")
    ),
    Case("iteration-absent", "megatron", leave, ("iter_0000099", f"there: {ITERATION}"),
         (f"{EXPORT} --iteration 99", "inspect SRC --iteration 99")),
    Case("iteration-no-number", "megatron", leave, ("'last'", "is not an iteration"),
         (f"{EXPORT} --iteration last", "inspect SRC --iteration last")),
    Case("iteration-all-of-none", "single", leave, ("SRC", "iter_"),
         (f"{EXPORT} --iteration all",)),
    Case("iteration-of-hugging-face", "single", leave, ("SRC", "iter_0000003"),
         (f"{EXPORT} --iteration 3", "inspect SRC --iteration 3")),
    Case("import-of-megatron", "megatron", leave, ("Megatron checkpoint already",), (IMPORT,)),
    Case("export-of-hugging-face", "single", leave, ("Hugging Face checkpoint already",),
         (EXPORT,)),
    Case("revision-of-a-path", "single", leave, ("SRC", "--revision"),
         (f"{IMPORT} --revision main",)),
    Case("hub-offline", "", leave, ("allenai/none", "HF_HUB_OFFLINE is set", "HF_HOME"),
         ("import allenai/none DST", "import allenai/none DST --revision main",
          "inspect allenai/none")),
    Case("vocabulary-larger-than-stored", "megatron", leave, ("1024 rows", "4096"),
         (f"{EXPORT} --vocab-size 4096",)),
    Case("hf-config-absent", "megatron", leave, ("no config.json",),
         (f"{EXPORT} --hf-config DST", "inspect SRC --hf-config DST")),
    Case("nothing-recorded", "single", leave, ("SRC", "nothing was recorded"), ("verify SRC",)),
    Case("record-no-json", "megatron", inside("olmo_bridge.json", "{"),
         ("olmo_bridge.json", "JSON"), ("verify SRC", "inspect SRC")),
    Case("record-of-something-else", "megatron",
         lambda src: edit_json(src / ITERATION / "olmo_bridge.json",
                               lambda x: x.update(files={DISTCP: {}})),
         ("olmo_bridge.json", "not the record"), ("verify SRC", "inspect SRC")),
]  # fmt: skip

CASES = [
    *HEADERS,
    *INDEXES,
    *TENSORS,
    *CONFIGS,
    *OTHER_FORMATS,
    *MEGATRON,
    *HOSTILE,
    *DESTINATIONS,
    *OPTIONS,
]


def every_command() -> Iterator[Any]:
    for case in CASES:
        usual = READ_MEGATRON if case.start == "megatron" else READ_HF
        for command in case.commands or usual:
            yield pytest.param(case, command, id=f"{case.id}: {command}")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "no-cache")
    )


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("case", "command"), every_command())
def test_is_refused(
    case: Case,
    command: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src, dst = tmp_path / "in" / "src", tmp_path / "out" / "dst"
    (tmp_path / "out").mkdir()
    if case.start:
        shutil.copytree(request.getfixturevalue(case.start), src)
    else:
        src.mkdir(parents=True)
    good = request.getfixturevalue(case.start or "single")
    case.damage(src)
    places = {"SRC": str(src), "DST": str(dst), "ABOVE": str(src.parent), "GOOD": str(good)}
    monkeypatch.chdir(tmp_path)
    before = tree_hash(tmp_path)

    result = run(command, places)

    assert tree_hash(tmp_path) == before
    assert not (tmp_path / SENTINEL).exists()
    said = message(result) if not (case.differs and "verify" in command) else table(result)
    for piece in case.says:
        # A tensor that is missing from one checkpoint is unexpected in the other.
        if result.exit_code == 2 or piece not in ("missing", "unexpected"):
            assert places.get(piece, piece) in said


def run(command: str, places: dict[str, str]) -> Result:
    words = [re.sub("|".join(places), lambda m: places[m[0]], word) for word in command.split()]
    return CliRunner().invoke(app, words)


def message(result: Result) -> str:
    """Return the message of a refused command, which must be all that it printed."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("olmo-bridge: ")
    assert result.stderr.count("olmo-bridge: ") == 1
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= SCREEN
    return result.stderr


def table(result: Result) -> str:
    """Return what ``verify`` printed about two checkpoints that differ."""
    assert result.exit_code == 1, result.output
    assert "NOT equal" in result.stdout
    return result.stdout


# -------------------------------------------------------- what needs another disk or another user


def test_a_disk_that_is_too_small_is_refused(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check comes before the first byte is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))

    said = message(CliRunner().invoke(app, ["import", str(single), str(tmp_path / "dst")]))

    assert "the disk is too small" in said
    assert re.search(r"2,\d{3},\d{3} bytes needed, 1,000,000 free", said)
    assert tree_hash(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB, with room for one import of the tiny model but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("a small file system can't be mounted here: needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_is_too_small_is_refused(single: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(3 << 20))
    before = tree_hash(small_disk)

    said = message(CliRunner().invoke(app, ["import", str(single), str(small_disk / "dst")]))

    assert "the disk is too small" in said
    assert tree_hash(small_disk) == before


def test_an_empty_mount_point_is_written_into(single: Path, small_disk: Path) -> None:
    """A container's volume is such a mount point. A rename can't replace it if it is not empty."""
    assert CliRunner().invoke(app, ["import", str(single), str(small_disk)]).exit_code == 0

    assert CliRunner().invoke(app, ["verify", str(single), str(small_disk)]).exit_code == 0
    said = message(CliRunner().invoke(app, ["import", str(single), str(small_disk), "--overwrite"]))
    assert "is a mount point; name a folder in it" in said


@pytest.mark.parametrize("preallocates", [True, False])
def test_a_disk_that_fills_up_during_the_copy_leaves_no_output(
    single: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, preallocates: bool
) -> None:
    """The disk looks large enough, but another program has filled it.

    With preallocation this is found before the first tensor, else in the middle of the copy.
    """
    (small_disk / "other").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    if not preallocates:
        monkeypatch.delattr(os, "posix_fallocate")
    before = tree_hash(small_disk)

    said = message(CliRunner().invoke(app, ["import", str(single), str(small_disk / "dst")]))

    assert "the disk is full. Nothing was kept." in said
    assert tree_hash(small_disk) == before


def test_complete_files_are_kept_when_the_disk_is_full(
    megatron: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ["export", str(megatron), str(small_disk / "dst"), "--max-shard-size", "500KB"]
    (small_disk / "other").write_bytes(bytes(5 << 19))
    allocate = os.posix_fallocate
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, size: os.ftruncate(fd, size))

    said = message(CliRunner().invoke(app, export))

    assert "the disk is full. What is complete is kept in" in said
    assert "--resume" in said
    assert message(CliRunner().invoke(app, ["inspect", str(small_disk / "dst.partial")]))
    (small_disk / "other").unlink()
    monkeypatch.undo()
    assert os.posix_fallocate is allocate
    assert CliRunner().invoke(app, [*export, "--resume"]).exit_code == 0
    assert (
        CliRunner().invoke(app, ["verify", str(megatron), str(small_disk / "dst")]).exit_code == 0
    )


def test_a_killed_run_does_not_count_as_a_full_disk(single: Path, small_disk: Path) -> None:
    """The resumed run reuses the space that the killed run allocated."""
    run_in_child(single, small_disk / "dst", "allocated")
    usage = shutil.disk_usage(small_disk)
    assert usage.free < usage.used

    resumed = CliRunner().invoke(app, ["import", str(single), str(small_disk / "dst"), "--resume"])

    assert resumed.exit_code == 0, resumed.stderr


def run_in_child(src: Path, dst: Path, point: str) -> None:
    script = Path(__file__).with_name("killable.py")
    command = [sys.executable, script, point, "0", "import", src, dst]
    assert subprocess.run(list(map(str, command))).returncode == -9


NOBODY = 65534


def as_nobody(*arguments: object) -> tuple[int, str]:
    """Run a command as a user without permissions; return its exit code and message.

    A dry run as the current user comes first to import every module: the other user may not be
    able to read Python's own files.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can switch to another user")
    words = list(map(str, arguments))
    script = (
        "import os\n"
        "from typer.testing import CliRunner\n"
        "from megatron_olmo_bridge.cli.app import app\n"
        f"CliRunner().invoke(app, {[*words, '--dry-run']!r})\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"result = CliRunner().invoke(app, {words!r})\n"
        "print(result.stderr if result.exit_code == 2 else repr(result), end='', flush=True)\n"
        "os._exit(result.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """Folder that another user can reach but not write to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_without_write_permission_is_refused(
    single: Path, megatron: Path, open_to_all: Path
) -> None:
    for command, source in (("import", single), ("export", megatron)):
        src = shutil.copytree(source, open_to_all / command)
        before = tree_hash(open_to_all)

        code, said = as_nobody(command, src, open_to_all / "dst")

        assert code == 2, said
        assert said == f"olmo-bridge: {open_to_all}: no permission to write here\n"
        assert tree_hash(open_to_all) == before


@pytest.mark.parametrize("unreadable", [ONE, "config.json", "generation_config.json"])
def test_a_file_without_read_permission_is_refused(
    single: Path, open_to_all: Path, unreadable: str
) -> None:
    src = shutil.copytree(single, open_to_all / "src")
    (src / unreadable).chmod(0o600)
    (open_to_all / "out").mkdir()
    (open_to_all / "out").chmod(0o777)
    before = tree_hash(open_to_all)

    code, said = as_nobody("import", src, open_to_all / "out" / "dst")

    assert code == 2, said
    assert said.startswith(f"olmo-bridge: {src / unreadable}: ")
    assert "ermission" in said
    assert tree_hash(open_to_all) == before


def test_the_table_names_every_case_once() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)


def test_unexpected_errors_still_name_the_file(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the operating system's words and the file; the exit code is 2."""
    broken = partial(fail, OSError(errno.EIO, "Input/output error", str(single / ONE)))
    monkeypatch.setattr("megatron_olmo_bridge.checkpoints.open.find_kind", broken)

    said = message(CliRunner().invoke(app, ["import", str(single), str(tmp_path / "dst")]))

    assert said == f"olmo-bridge: {single / ONE}: Input/output error\n"
    assert tree_hash(tmp_path) == {}


def fail(error: Exception, *_: object) -> None:
    raise error
