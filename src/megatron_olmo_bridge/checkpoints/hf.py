"""Hugging Face checkpoints: a folder with config.json and safetensors files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import ClassVar

from megatron_olmo_bridge.errors import FormatError, InputError, MappingError
from megatron_olmo_bridge.formats.hf_folder import (
    CONFIG,
    HFFolder,
    hint_at_folders_inside,
    is_hf_folder,
    refuse_other_weights,
)
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.tensors import Piece, StoredArray, TensorView
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import as_classifier, bridge_for, is_buffer, may_be_tied
from megatron_olmo_bridge.models.tables import HF_HEAD, HF_SCORE
from megatron_olmo_bridge.storage.transfer import Transfer

from .checkpoint import Checkpoint, ReadOptions, artifact_patterns
from .name_hints import explaining_names


@dataclass(frozen=True, kw_only=True)
class HFCheckpoint(Checkpoint):
    """Hugging Face folder, read as transformers reads it."""

    kind: ClassVar[str] = "Hugging Face"
    looks_like: ClassVar[str] = "config.json and safetensors"
    accepted_options: ClassVar[tuple[str, ...]] = ("num_labels",)

    hf_folder: HFFolder
    """Config and arrays by the mapping's names; the config is that of the model as read."""
    new_tensors: frozenset[str] = frozenset()
    """Tensors that no file has, initialized with zeros: a new classification head."""

    @classmethod
    def find(cls, path: AnyPath, iteration: int | str | None) -> AnyPath | None:
        if not path.is_dir():
            return None
        if is_hf_folder(path):
            return path
        refuse_other_weights(path)
        if hint := hint_at_folders_inside(path):
            raise InputError(f"{path}: not a checkpoint itself. {hint}")
        return None

    @classmethod
    def file_patterns(cls, path: AnyPath) -> dict[AnyPath, tuple[str, ...]]:
        return artifact_patterns(path)

    @classmethod
    def open(cls, path: AnyPath, options: ReadOptions, strict: bool) -> HFCheckpoint:
        hf = HFFolder.read(path, is_buffer, may_be_tied)
        bridge = bridge_for(hf.config, path / CONFIG)
        arrays = _split_experts(_by_table_names(hf, bridge), bridge, path)
        config, notes = hf.config, []
        if options.num_labels is not None:
            if bridge.num_labels is not None:
                raise InputError(
                    f"{path}: has a classification head of {bridge.num_labels} classes"
                )
            config = as_classifier(hf.config, options.num_labels, path / CONFIG)
            arrays.pop(HF_HEAD, None)
        elif _has_untied_head(bridge, arrays):
            config = {**config, "tie_word_embeddings": False}
            notes = [
                f"config.json says that embeddings are tied, but {HF_HEAD} differs from "
                f"{bridge.hf_embedding}: kept as a head of its own, as transformers 5 does"
            ]
        elif bridge.num_labels is not None and HF_HEAD in arrays:
            notes = [f"{HF_HEAD} was left out: a classifier doesn't use a language model's head"]
        if config is not hf.config:
            bridge = bridge_for(config, path / CONFIG)
        registry = bridge.mapping_registry()
        registry.check_size(len(arrays), path)
        mapping = registry.resolve()
        new_tensors = frozenset((HF_SCORE,) if options.num_labels is not None else ())
        if strict:
            shapes = {name: array.shape for name, array in arrays.items()}
            shapes |= {name: mapping.hf_shapes[name] for name in new_tensors}
            with explaining_names(shapes, bridge):
                mapping.check_hf(shapes, path)
        return cls(
            path=path,
            bridge=bridge,
            mapping=mapping,
            config_from=path / CONFIG,
            artifacts_folder=path,
            hf_folder=replace(hf, config=config, arrays=arrays),
            new_tensors=new_tensors,
            reading_notes=tuple(notes),
        )

    @cached_property
    def tensors(self) -> dict[str, TensorView]:
        arrays, shapes = self.hf_folder.arrays, self.mapping.hf_shapes
        unexpected = [name for name in arrays if name not in shapes]  # unless opened strictly
        views = {
            name: TensorView.of_array(name, arrays[name])
            for name in [*shapes, *unexpected]
            if name in arrays and self.mapping.reason_to_ignore(name) is None
        }
        dtype = next(iter(views.values())).dtype
        zeros = {
            name: TensorView(name, shapes[name], dtype, (Piece.zeros(Region.whole(shapes[name])),))
            for name in self.new_tensors
        }
        return views | zeros

    @property
    def layout(self) -> str:
        return f"{len(self.hf_folder.shards)} safetensors file(s)"


def _by_table_names(hf: HFFolder, bridge: ModelBridge) -> dict[str, StoredArray]:
    """Return the arrays by the names of the mapping table.

    Raises:
        FormatError: a tensor is stored under two names.
    """
    table_names, arrays = bridge.hf_names(hf.arrays), {}
    for name, array in hf.arrays.items():
        table_name = table_names.get(name, name)
        if table_name in arrays or (table_name != name and table_name in hf.arrays):
            raise FormatError(f"{hf.path}: has both {table_name} and {name}, which mean the same")
        arrays[table_name] = array
    return arrays


def _split_experts(
    arrays: dict[str, StoredArray], bridge: ModelBridge, path: AnyPath
) -> dict[str, StoredArray]:
    """Return the arrays with each layer's fused experts split into one array per projection.

    transformers 5 fuses them in memory, and saves them so with ``save_original_format=False``:
    ``gate_up_proj`` is [experts, gate over up, hidden], ``down_proj`` is [experts, hidden, ffn].

    Raises:
        MappingError: a fused tensor has the wrong shape.
    """
    if bridge.num_experts is None:
        return arrays
    c, split = bridge.config, {}
    projections_of = {
        "gate_up_proj": (("gate_proj", "up_proj"), (c.ffn_hidden_size, c.hidden_size)),
        "down_proj": (("down_proj",), (c.hidden_size, c.ffn_hidden_size)),
    }
    for name, array in arrays.items():
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts") or last not in projections_of:
            split[name] = array
            continue
        projections, shape = projections_of[last]
        expected = (bridge.num_experts, len(projections) * shape[0], shape[1])
        if array.shape != expected:
            raise MappingError(
                f"{path}: {name} has shape {list(array.shape)}, the config asks for "
                f"{list(expected)}"
            )
        for i, (expert, projection) in enumerate(product(range(expected[0]), projections)):
            part = replace(array, shape=shape)
            part = replace(part, offset=array.offset + i * part.nbytes)
            split[f"{module}.{expert}.{projection}.weight"] = part
    return split


def _has_untied_head(bridge: ModelBridge, arrays: dict[str, StoredArray]) -> bool:
    """Return whether the config ties embeddings, but a different head is stored.

    transformers 5 then keeps both: ``PreTrainedModel.tie_weights`` ties a missing or equal head.
    """
    head, embedding = arrays.get(HF_HEAD), arrays.get(bridge.hf_embedding)
    if not bridge.is_tied or head is None or embedding is None:
        return False
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return True
    views = [TensorView.of_array("", array) for array in (head, embedding)]
    with Transfer() as left, Transfer() as right:
        blocks = zip(left.blocks(views[0]), right.blocks(views[1]), strict=True)
        # A bytearray is compared as memory, a memoryview element by element.
        return any(bytearray(a) != b for (_, _, a), (_, _, b) in blocks)
