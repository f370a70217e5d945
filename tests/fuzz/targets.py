"""Fuzz targets: a valid file, how it is damaged, and two functions that read it.

One function uses this package, the other the library that owns the format; both return the same
plain JSON for the same file. This package's reader imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("olmo", "olmo2", "olmo3", "olmoe", "flex-olmo", "gpt2")
OLMO_CORE = Path(__file__).parents[1] / "functional_tests/olmo_core/checkpoints.tar.xz"
ITERATION = Path("megatron/iter_0000000")
Function = Callable[[Path], Any]


@dataclass(frozen=True)
class Target:
    """Kind of untrusted file."""

    name: str
    start: str
    """Name of the valid folder that contains the file; see :func:`build`."""
    file: Path
    """Path of the damaged file in that folder."""
    change: str
    """Name of the function in ``mutations`` that damages it."""
    read: Function
    """Read the folder with this package."""
    reference: Function | None = None
    """Read the folder with the format's own library. None if damage must not change the result:
    then the result for the valid folder is the reference."""


def build(folder: Path) -> None:
    """Make the valid folders with the files of all targets."""
    import numpy as np
    import torch

    from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
    from megatron_olmo_bridge.data.indexed import write_index
    from megatron_olmo_bridge.tools.synth import synth

    for family in FAMILIES:
        synth(f"{family}-tiny", folder / family, layers=4 if family == "olmo3" else 1)
    synth("olmo2-tiny", folder / "sharded", layers=1, max_shard_size="200KB")
    import_checkpoint(folder / "olmo2", folder / "export" / "megatron")
    import_checkpoint(folder / "olmo2", folder / "run-config" / "megatron")
    for file in (folder / "run-config" / ITERATION / "hf").iterdir():
        file.unlink()
    with tarfile.open(OLMO_CORE) as archive:
        archive.extractall(folder / "runs", filter="data")
    for name in ("olmo2", "olmo3-adamw"):
        (folder / "runs" / name / "step3").rename(folder / f"olmo-core-{name}")
    (folder / "archive").mkdir()
    torch.save(torch.arange(12.0).view(3, 4), folder / "archive" / "piece.distcp")
    (folder / "data").mkdir()
    lengths = np.array([3, 0, 5, 1], np.int32)
    write_index(folder / "data" / "data.idx", lengths, np.dtype("uint16"))
    np.arange(lengths.sum(), dtype=np.uint16).tofile(folder / "data" / "data.bin")
    lines = [{"text": "one"}, {"id": 2, "text": "zw\u00f6\n\U0001f600"}, {"text": ""}]
    (folder / "data" / "texts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


# -------------------------------------------------------------------- what this package understands


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _weights(plan: Any) -> list[Any]:
    """Return the copy plan without literal bytes: the destination of all stored bytes."""
    return [
        [file.name, file.size, part.offset, part.dtype, [
            [p.array and [p.array.file.name, p.array.offset, p.array.shape],
             p.array_region, p.tensor_region]
            for view in part.view.stored for p in view.pieces
        ]]
        for file in plan.files for part in file.payloads
    ]  # fmt: skip


def read_safetensors(folder: Path) -> Any:
    from megatron_olmo_bridge.formats.safetensors import read_header

    file = folder / "model.safetensors"
    data = file.read_bytes()
    return {
        name: [array.dtype, list(array.shape), _sha(data[array.offset :][: array.nbytes])]
        for name, array in read_header(file).items()
    }


def plan_import(folder: Path) -> Any:
    from megatron_olmo_bridge.convert.to_megatron import plan_import

    return _weights(plan_import(folder)[0])


def read_config(folder: Path) -> Any:
    from megatron_olmo_bridge.checkpoints.open import open_checkpoint
    from megatron_olmo_bridge.convert.to_megatron import plan_import

    plan_import(folder)
    bridge = open_checkpoint(folder).bridge
    return {
        hf: bridge.config_values[ours]
        for ours, hf in {
            "num_layers": "num_hidden_layers", "hidden_size": "hidden_size",
            "num_attention_heads": "num_attention_heads", "vocab_size": "vocab_size",
            "num_query_groups": "num_key_value_heads", "ffn_hidden_size": "intermediate_size",
            "layernorm_epsilon": "rms_norm_eps", "max_position_embeddings":
            "max_position_embeddings", "num_moe_experts": "num_experts", "clip_qkv": "clip_qkv",
            "moe_router_topk": "num_experts_per_tok",
            "share_embeddings_and_output_weights": "tie_word_embeddings",
        }.items()
        if ours in bridge.config_values and hf not in _FIXED.get(bridge.family, ())
    }  # fmt: skip


_FIXED = {
    "olmo": ("rms_norm_eps",), "gpt2": ("intermediate_size", "rms_norm_eps"),
}  # fmt: skip
"""Numbers that a family's config.json has under another name or lacks."""


def plan_export(folder: Path) -> Any:
    from megatron_olmo_bridge.convert.to_hf import plan_exports

    exports = plan_exports(folder / "megatron", folder / "not-made")
    exports.check_all_planned("nowhere")
    return _weights(exports.plans[0][0])


def read_olmo_core(folder: Path) -> Any:
    from megatron_olmo_bridge.checkpoints.open import open_checkpoint
    from megatron_olmo_bridge.convert.options import ImportOptions
    from megatron_olmo_bridge.convert.to_megatron import plan_import

    plan_import(folder, ImportOptions(optimizer=True))
    values = open_checkpoint(folder).bridge.config_values
    windows = values.get("window_size")
    return {name: values[name] for name in _OLMO_CORE_NUMBERS} | {
        "window": windows and windows[0] + 1
    }


_OLMO_CORE_NUMBERS = (
    "num_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_query_groups",
    "ffn_hidden_size", "layernorm_epsilon", "rotary_base",
)  # fmt: skip


def plan_olmo_core(folder: Path) -> Any:
    from megatron_olmo_bridge.convert.options import ImportOptions
    from megatron_olmo_bridge.convert.to_megatron import plan_import

    plan = _weights(plan_import(folder, ImportOptions(optimizer=True))[0])
    return [[Path(name).name, *rest] for name, *rest in plan]  # the folder has the step's number


def read_run_config(folder: Path) -> Any:
    from megatron_olmo_bridge.checkpoints.open import open_checkpoint

    plan_export(folder)
    numbers = open_checkpoint(folder / "megatron").bridge.config_values
    return {name: numbers[name] for name in _RUN_CONFIG_NUMBERS}


_RUN_CONFIG_NUMBERS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "vocab_size", "layernorm_epsilon", "rotary_base",
    "share_embeddings_and_output_weights",
)  # fmt: skip


def read_metadata(folder: Path) -> Any:
    from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder

    plan_export(folder)
    tensors = TorchDistFolder.read(folder / ITERATION).tensors
    return {
        key: [tensor.dtype, list(tensor.shape), sorted(
            [list(c.offset), list(c.shape), c.stored.file, c.stored.offset, c.stored.length]
            for c in tensor.chunks
        )]
        for key, tensor in tensors.items()
    }  # fmt: skip


def read_archive(folder: Path) -> Any:
    from megatron_olmo_bridge.formats.torch_archive import read_tensor

    file = folder / "piece.distcp"
    array = read_tensor(file, 0, file.stat().st_size)
    data = file.read_bytes()[array.offset :][: array.nbytes]
    return [array.dtype, list(array.shape), _sha(data)]


def read_indexed(folder: Path) -> Any:
    from megatron_olmo_bridge.data.indexed import read_indexed
    from megatron_olmo_bridge.data.info import describe

    describe(folder / "data")
    data = read_indexed(folder / "data")
    tokens = data.first_tokens(data.tokens)
    return [data.dtype.name, data.lengths.tolist(), data.bounds.tolist(), tokens.tolist()]


def read_lines(folder: Path) -> Any:
    from megatron_olmo_bridge.data.documents import TextOptions, read_texts, text_spans

    options = TextOptions()
    spans = text_spans(str(folder / "texts.jsonl"), 1 << 20, options)
    return [text for span in spans for batch in read_texts(span, options) for text in batch.texts]


# ----------------------------------------------------------------------------- what the others read


def safetensors_reads(folder: Path) -> Any:
    import safetensors

    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return {
        name: [names[value["dtype"]], value["shape"], _sha(value["data"])]
        for name, value in safetensors.deserialize((folder / "model.safetensors").read_bytes())
    }


def transformers_reads(folder: Path) -> Any:
    from safetensors import safe_open
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Only what is compared: a conversion copies the rest as it is, and transformers refuses the
    # whole file for one value of another type.
    values = json.loads((folder / "config.json").read_bytes())
    asked = json.loads((folder / "asked.json").read_text())
    classes = {name: key for key, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    names = values.get("architectures") or [""]
    name = names if isinstance(names, str) else names[0]
    family = CONFIG_MAPPING[values.get("model_type") or classes.get(name, name)]
    compared = {*asked, *(family.attribute_map.get(key, key) for key in asked)}
    given = {key: value for key, value in values.items() if key in compared}
    # A number without a fraction is written without a point by most: transformers refuses that.
    for key in {"rms_norm_eps", "clip_qkv"} & given.keys():
        given[key] = float(given[key]) if type(given[key]) is int else given[key]
    if given.get("tie_word_embeddings") is True:
        # PreTrainedModel.tie_weights keeps a head that the file has.
        with safe_open(folder / "model.safetensors", "np") as file:
            given["tie_word_embeddings"] = "lm_head.weight" not in file.keys()  # noqa: SIM118
    config = family(**given)
    return {key: getattr(config, key) for key in asked}


def yaml_reads(folder: Path) -> Any:
    import yaml

    model = yaml.safe_load((folder / ITERATION / "run_config.yaml").read_bytes())["model"]
    # As TransformerConfig.__post_init__ of megatron-core sets what is None.
    heads, hidden = model["num_attention_heads"], model["hidden_size"]
    derived = {
        "kv_channels": lambda: hidden // heads,
        "num_query_groups": lambda: heads,
        "ffn_hidden_size": lambda: 4 * hidden,
    }
    for name, value in derived.items():
        model[name] = value() if model[name] is None else model[name]
    return {name: model[name] for name in _RUN_CONFIG_NUMBERS}


def json_reads_olmo_core(folder: Path) -> Any:
    model = json.loads((folder / "config.json").read_bytes())["model"]
    block = model["block"]
    attention = block["sequence_mixer"]
    windows = attention.get("sliding_window")
    sizes = {n for n in windows["pattern"] if n != -1} if windows else set()
    numbers = (
        model["n_layers"], model["d_model"], model["vocab_size"], attention["n_heads"],
        attention["n_kv_heads"] or attention["n_heads"], block["feed_forward"]["hidden_size"],
        block["layer_norm"]["eps"], attention["rope"]["theta"],
    )  # fmt: skip
    return dict(zip(_OLMO_CORE_NUMBERS, numbers, strict=True)) | {
        "window": max(sizes, default=None)
    }


def torch_reads_metadata(folder: Path) -> Any:
    """Read with torch's own classes; names that the valid file doesn't have are refused."""
    import pickle

    import torch
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            for known in (metadata, torch, torch.serialization):
                if module == known.__name__ and hasattr(known, name):
                    return getattr(known, name)
            if name in ("_StorageInfo", "_StoragePrefix"):
                return {"_StorageInfo": _StorageInfo, "_StoragePrefix": _StoragePrefix}[name]
            raise pickle.UnpicklingError(f"{module}.{name}")

    with (folder / ITERATION / ".metadata").open("rb") as file:
        read = Reader(file).load()
    stored = {(index.fqn, index.offset and tuple(index.offset)): info
              for index, info in read.storage_data.items()}  # fmt: skip
    found = {}
    for key, tensor in read.state_dict_metadata.items():
        if isinstance(tensor, metadata.TensorStorageMetadata):
            chunks = [
                [list(c.offsets), list(c.sizes), i.relative_path, i.offset, i.length]
                for c in tensor.chunks
                for i in [stored[key, tuple(c.offsets)]]
            ]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            found[key] = [dtype, list(tensor.size), sorted(chunks)]
    return found


def torch_reads_archive(folder: Path) -> Any:
    import torch

    tensor = torch.load(folder / "piece.distcp", weights_only=True)
    data = bytes(tensor.flatten().view(torch.uint8).tolist())
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _sha(data)]


def megatron_reads(folder: Path) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(folder / "data"))
    lengths = data.sequence_lengths.tolist()
    tokens = [token for i in range(len(lengths)) for token in data.get(i).tolist()]
    return [data.index.dtype.__name__, lengths, data.document_indices.tolist(), tokens]


def json_reads(folder: Path) -> Any:
    texts = []
    for line in (folder / "texts.jsonl").read_bytes().split(b"\n"):
        try:
            value = json.loads(line.decode())
            value["text"].encode()
            texts.append(value["text"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
    return texts


TARGETS = [
    Target("safetensors", "olmo2", Path("model.safetensors"), "changed_safetensors",
           read_safetensors, safetensors_reads),
    Target("index", "sharded", Path("model.safetensors.index.json"), "changed_json", plan_import),
    *(
        Target(f"config-{family}", family, Path("config.json"), "changed_json", read_config,
               transformers_reads)
        for family in FAMILIES
    ),
    Target("run_config", "run-config", ITERATION / "run_config.yaml", "changed_yaml",
           read_run_config, yaml_reads),
    Target("run_config-beside", "export", ITERATION / "run_config.yaml", "changed_yaml",
           plan_export),
    Target("metadata", "export", ITERATION / ".metadata", "changed_pickle", read_metadata,
           torch_reads_metadata),
    Target("common", "export", ITERATION / "common.pt", "changed_archive", plan_export),
    *(
        Target(f"olmo_core-{name}", f"olmo-core-{name}", Path("config.json"), "changed_json",
               read_olmo_core, json_reads_olmo_core)
        for name in ("olmo2", "olmo3-adamw")
    ),
    Target("olmo_core-trainer", "olmo-core-olmo2", Path("train/rank0.pt"), "changed_archive",
           plan_olmo_core),
    Target("archive", "archive", Path("piece.distcp"), "changed_archive", read_archive,
           torch_reads_archive),
    Target("indexed", "data", Path("data.idx"), "changed_bytes", read_indexed, megatron_reads),
    Target("jsonl", "data", Path("texts.jsonl"), "changed_lines", read_lines, json_reads),
]  # fmt: skip


def functions(side: str) -> dict[str, Function]:
    """Return every target's function of one side, with what it needs imported."""
    found: dict[str, Function] = {}
    if side == "reference":
        import torch.distributed.checkpoint  # noqa: F401
        import transformers.models.auto  # noqa: F401
        from megatron.core.datasets import indexed_dataset  # noqa: F401

        return found | {t.name: t.reference for t in TARGETS if t.reference is not None}
    import megatron_olmo_bridge.convert.to_hf
    import megatron_olmo_bridge.convert.to_megatron
    import megatron_olmo_bridge.data.info  # noqa: F401
    from megatron_olmo_bridge.models.families import published_sizes

    published_sizes()  # imports the families
    return found | {t.name: t.read for t in TARGETS}
