"""Checkpoints of OLM's trainer, ``step_N.pt``: GPT-2 built from OLM's blocks.

OLM is the PyPI package ``openlanguagemodel``; this module follows version 2.2.1. Tensor names and
arithmetic are those of ``GPT2Model`` in olm/models/openai/gpt2.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any, ClassVar

from megatron_olmo_bridge.errors import InputError, MappingError
from megatron_olmo_bridge.formats.files import refuse_pointer
from megatron_olmo_bridge.formats.hf_folder import CONFIG, read_config
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.tensors import Piece, StoredArray, TensorView
from megatron_olmo_bridge.formats.torch_archive import arrays_by_name, read_archive
from megatron_olmo_bridge.mapping.mappings import WILDCARD, numbered, split_numbers
from megatron_olmo_bridge.mapping.placement import Region, Shape
from megatron_olmo_bridge.mapping.registry import bulleted, check_tensors
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.models.gpt2.bridge import GPT2Bridge

from .checkpoint import Checkpoint, KindOption, ReadOptions

MODEL_KEYS = ("model_state_dict", "model")
"""Keys of the model's tensors: the first is written by olm/train/callbacks/checkpoint_cb.py, the
second by FSDPTrainer in olm/train/trainer/fsdp_trainer.py."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DDP (olm/train/trainer/ddp_trainer.py) and torch.compile add to every name."""

_ATTENTION = "blocks.1.stack.*.blocks.0.block.blocks"
_MLP = "blocks.1.stack.*.blocks.1.block.blocks"
TOKENS = "blocks.0.blocks.0.embedding.weight"
POSITIONS = "blocks.0.blocks.1.pos_embedding.weight"
UP = f"{_MLP}.1.up_proj.weight"
HEAD = "blocks.2.blocks.1.weight"
"""The head. With ``tie_weights`` it shares the embedding's storage."""

OLM_TENSORS = {
    "transformer.wte.weight": [TOKENS],
    "transformer.wpe.weight": [POSITIONS],
    "transformer.h.*.ln_1.weight": [f"{_ATTENTION}.0.gamma"],
    "transformer.h.*.ln_1.bias": [f"{_ATTENTION}.0.beta"],
    "transformer.h.*.attn.c_attn.weight": [f"{_ATTENTION}.1.{x}_proj.weight" for x in "qkv"],
    "transformer.h.*.attn.c_attn.bias": [f"{_ATTENTION}.1.{x}_proj.bias" for x in "qkv"],
    "transformer.h.*.attn.c_proj.weight": [f"{_ATTENTION}.1.out_proj.weight"],
    "transformer.h.*.attn.c_proj.bias": [f"{_ATTENTION}.1.out_proj.bias"],
    "transformer.h.*.ln_2.weight": [f"{_MLP}.0.gamma"],
    "transformer.h.*.ln_2.bias": [f"{_MLP}.0.beta"],
    "transformer.h.*.mlp.c_fc.weight": [UP],
    "transformer.h.*.mlp.c_fc.bias": [f"{_MLP}.1.up_proj.bias"],
    "transformer.h.*.mlp.c_proj.weight": [f"{_MLP}.1.down_proj.weight"],
    "transformer.h.*.mlp.c_proj.bias": [f"{_MLP}.1.down_proj.bias"],
    "transformer.ln_f.weight": ["blocks.2.blocks.0.gamma"],
    "transformer.ln_f.bias": ["blocks.2.blocks.0.beta"],
    "lm_head.weight": [HEAD],
}
"""Hugging Face tensor: the OLM tensors that it consists of, concatenated along the rows."""
TRANSPOSED = {
    "transformer.h.*.attn.c_attn.weight",
    "transformer.h.*.attn.c_proj.weight",
    "transformer.h.*.mlp.c_fc.weight",
    "transformer.h.*.mlp.c_proj.weight",
}
"""``Conv1D`` weights [in, out]; OLM's are [out, in], concatenated, then transposed."""

OLM_CONSTANTS = {
    # LayerNorm's default in olm/nn/norms/layer_norm.py, which GPT2Model leaves as it is.
    "layer_norm_epsilon": 1e-5,
    # ClassicFFN's default in olm/nn/feedforward/classic_ffn.py: GELU(approximate="none").
    "activation_function": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class OLMCheckpoint(Checkpoint):
    """A file of OLM's trainer; its shapes tell the model but for the number of heads."""

    kind: ClassVar[str] = "OLM"
    looks_like: ClassVar[str] = "a file of its trainer, step_N.pt"
    accepted_options: ClassVar[tuple[str, ...]] = ("hf_config",)
    own_options: ClassVar[tuple[KindOption, ...]] = (
        KindOption(
            "heads", int, "Attention heads of OLM's step_N.pt, which doesn't say.", minimum=1
        ),
    )

    views: dict[str, TensorView]
    """The Hugging Face tensors, assembled from the file's."""

    @classmethod
    def find(cls, path: AnyPath, iteration: int | str | None) -> AnyPath | None:
        if not (path.is_file() and path.suffix == ".pt"):
            return None
        refuse_pointer(path)
        return path

    @classmethod
    def file_patterns(cls, path: AnyPath) -> dict[AnyPath, tuple[str, ...]]:
        return {path.parent: (escape(path.name),)}

    @classmethod
    def open(cls, path: AnyPath, options: ReadOptions, strict: bool) -> OLMCheckpoint:
        arrays = read_olm(path)
        artifacts_folder = Path(options.hf_config) if options.hf_config else None
        config = read_config(artifacts_folder) if artifacts_folder else None
        config_from = artifacts_folder / CONFIG if artifacts_folder else path
        heads = options.kind_options.get("heads")
        bridge = bridge_of(arrays, heads, config, path, config_from)
        mapping = bridge.mapping_registry().resolve()
        return cls(
            path=path,
            bridge=bridge,
            mapping=mapping,
            config_from=config_from,
            artifacts_folder=artifacts_folder,
            views=hf_views(arrays, mapping.hf_shapes, path),
        )

    @property
    def tensors(self) -> dict[str, TensorView]:
        return self.views

    @property
    def layout(self) -> str:
        return "a file of its trainer"


def read_olm(file: AnyPath) -> dict[str, StoredArray]:
    """Return the model's tensors by OLM's names, in the order of its state dict.

    No code of the file's pickle is run or imported, and no tensor is read.

    Raises:
        InputError: the file is not a checkpoint of OLM's trainer.
        FormatError: the file is truncated, compressed or not an archive of torch.save; or a tensor
            is not contiguous, or of a dtype that is not converted.
        UnsafePickleError: the pickle names a global that has no place in a checkpoint.
    """
    value = read_archive(file)
    # Only index the value: a pickle may give an object attributes that hide its methods.
    models = [value[k] for k in MODEL_KEYS if k in value] if isinstance(value, dict) else []
    arrays = arrays_by_name(models[0] if models else None, file)
    if arrays is None:
        raise InputError(
            f"{file}: not a checkpoint of OLM's trainer: it has no {' or '.join(MODEL_KEYS)} with "
            "tensors by name"
        )
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in arrays):
            arrays = {name.removeprefix(wrapper): array for name, array in arrays.items()}
    return arrays


def bridge_of(
    arrays: Mapping[str, StoredArray],
    heads: int | None,
    config: dict[str, Any] | None,
    file: AnyPath,
    config_from: AnyPath,
) -> GPT2Bridge:
    """Return the model, whose sizes follow from the shapes, all but the number of attention heads.

    Args:
        arrays: the checkpoint's tensors by OLM's names.
        heads: number of attention heads; None takes the config's.
        config: values of a ``config.json``; None makes them.
        file: the checkpoint, for messages.
        config_from: file that ``config`` was read from, or the checkpoint.

    Raises:
        InputError: the number of heads is unknown, or the config is of another model.
        MappingError: a tensor that the sizes are read from is absent.
    """
    needed = [TOKENS, POSITIONS, numbered(UP, (0,)), HEAD]
    if absent := [n for n in needed if n not in arrays or len(arrays[n].shape) != 2]:
        raise MappingError(
            f"{file}: not GPT-2 as OLM's GPT2Model is put together, the only one of its models "
            f"that is converted; it has no such matrices:\n{bulleted(absent)}"
        )
    (vocab, hidden), positions = arrays[TOKENS].shape, arrays[POSITIONS].shape[0]
    ffn = arrays[numbered(UP, (0,))].shape[0]
    if heads is None and config is None:
        raise InputError(
            f"{file}: doesn't say how many attention heads its model has, and its tensors are "
            "the same for any number. Pass --heads, or --hf-config with a folder that has the "
            "model's config.json. For a command without these options, first export it: "
            f"olmo-bridge export {file} DST --heads N"
        )
    layer_number = re.escape(UP).replace(re.escape(WILDCARD), r"(\d+)")
    own_config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_positions": positions,
        "n_embd": hidden,
        # Counted, so that a layer that is left out in between is reported as missing.
        "n_layer": sum(re.fullmatch(layer_number, name) is not None for name in arrays),
        "n_head": heads or (config or {}).get("n_head"),
        "n_inner": None if ffn == 4 * hidden else ffn,
        **OLM_CONSTANTS,
        # transformers' defaults are GPT-2's token ids, which may lie outside the vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": arrays[HEAD] == arrays[TOKENS],
        "torch_dtype": arrays[TOKENS].dtype,
    }
    bridge = bridge_for(config or own_config, config_from)
    if not isinstance(bridge, GPT2Bridge):
        raise InputError(f"{config_from}: is the config of {bridge.family}, {file} is GPT-2")
    stated, stored = bridge.config_values, asdict(bridge.config_class.from_hf(own_config))
    if wrong := [f"{k} is {stated[k]}, not {v}" for k, v in stored.items() if stated[k] != v]:
        raise InputError(f"{config_from}: not the config of {file}:\n{bulleted(wrong)}")
    return bridge


def hf_views(
    arrays: Mapping[str, StoredArray], hf_shapes: Mapping[str, Shape], file: AnyPath
) -> dict[str, TensorView]:
    """Return every Hugging Face tensor, assembled from OLM's, without a tied head.

    Args:
        arrays: the checkpoint's tensors by OLM's names.
        hf_shapes: name and shape of every Hugging Face tensor, in the order of the result.
        file: the checkpoint, for messages.

    Raises:
        MappingError: tensors are missing, unexpected, or have the wrong shape.
        FormatError: the parts of a tensor have different dtypes.
    """
    sources = {hf_name: _sources_of(hf_name) for hf_name in hf_shapes}
    expected: dict[str, Shape] = {}
    for hf_name, (names, transposed) in sources.items():
        rows, *columns = hf_shapes[hf_name][::-1] if transposed else hf_shapes[hf_name]
        expected |= dict.fromkeys(names, (rows // len(names), *columns))
    used = {n: a for n, a in arrays.items() if n in expected or n != HEAD}
    check_tensors(expected, {name: array.shape for name, array in used.items()}, file)
    return {
        hf_name: _concatenated(hf_name, hf_shapes[hf_name], [arrays[n] for n in names], transposed)
        for hf_name, (names, transposed) in sources.items()
    }


def _sources_of(hf_name: str) -> tuple[list[str], bool]:
    """Return the OLM tensors of a Hugging Face tensor, and whether they are transposed."""
    pattern, index = split_numbers(hf_name)
    return [numbered(name, index) for name in OLM_TENSORS[pattern]], pattern in TRANSPOSED


def _concatenated(
    hf_name: str, shape: Shape, arrays: list[StoredArray], transposed: bool
) -> TensorView:
    """Concatenate the arrays along the rows, then transpose the result if asked to."""
    pieces, top = [], 0
    for array in arrays:
        whole = Region.whole(array.shape)
        region = whole._replace(top=top, bottom=top + whole.rows)
        top = region.bottom
        pieces.append(Piece(array, whole, region.transposed if transposed else region, transposed))
    return TensorView.assembled(hf_name, shape, pieces)
