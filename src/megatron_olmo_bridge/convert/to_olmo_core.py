"""Export a checkpoint as a training checkpoint of OLMo-core."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, OptimizerState
from megatron_olmo_bridge.checkpoints.olmo_core import TENSORS
from megatron_olmo_bridge.checkpoints.olmo_core_state import (
    GROUPS,
    MOMENTS,
    PROGRESS,
    STATE,
    WEIGHTS,
)
from megatron_olmo_bridge.formats.dcp_metadata import (
    METADATA,
    Chunk,
    GlobalTensor,
    StoredBytes,
    encode_metadata,
)
from megatron_olmo_bridge.formats.hf_folder import CONFIG
from megatron_olmo_bridge.formats.tensors import Piece, TensorView
from megatron_olmo_bridge.formats.torch_archive import object_archive, tensor_archive
from megatron_olmo_bridge.mapping.placement import Region, Shape
from megatron_olmo_bridge.models.olmo_core_export import olmo_core_config
from megatron_olmo_bridge.models.olmo_core_names import EMBEDDING, StoredAs, stored_as
from megatron_olmo_bridge.storage.plan import CopyPlan, Packer

VERSION = "3.0.0"
"""Version of OLMo-core whose layout is written; 1.9 and 2.x have the same."""
FILE_BYTES = 2 << 30
ALIGNMENT = 64
_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""Settings of torch.optim.AdamW besides those that are carried, with its defaults."""


def plan_olmo_core(source: Checkpoint, dtype: str, state: OptimizerState | None) -> CopyPlan:
    """Plan the files of ``stepN``, with the optimizer state or the weights alone.

    Args:
        source: the checkpoint.
        dtype: dtype of the weights without optimizer state; with it they are float32.
        state: its optimizer state.

    Raises:
        UnsupportedError: OLMo-core has no such model.
    """
    config = olmo_core_config(source.bridge)
    packer = Packer(f"{TENSORS}/__0_{{}}.distcp".format, FILE_BYTES, ALIGNMENT)
    tensors: dict[str, GlobalTensor] = {}
    objects: dict[str, StoredBytes] = {}
    weights = state.tensors["param"] if state else source
    for name, shape, view in _tensors(weights):
        stored = "float32" if state else dtype if dtype != "keep" else view.dtype
        tensors[WEIGHTS + name] = _packed(shape, view, stored, packer)
    if state:
        for kind in MOMENTS:
            for name, shape, view in _tensors(state.tensors[kind]):
                tensors[f"{STATE}{name}.{kind}"] = _packed(shape, view, "float32", packer)
        for key in list(tensors):
            if key.startswith(WEIGHTS):
                name = key.removeprefix(WEIGHTS)
                tensors[f"{STATE}{name}.step"] = _packed_number(state.step, packer)
                for setting, value in _settings(name, state).items():
                    place = packer.add(object_archive(value), None, "", b"")
                    objects[f"{GROUPS}{name}.{setting}"] = _inside(place)
    paths = {key: tuple(key.split(".", 1)) for key in (*tensors, *objects)}
    texts = {
        CONFIG: json.dumps(config).encode(),
        ".metadata.json": json.dumps({"version": VERSION, "ephemeral": False}).encode(),
        f"{TENSORS}/{METADATA}": encode_metadata(tensors, objects, paths),
    }
    if state and state.trainer:
        texts[str(PROGRESS)] = object_archive(_progress(state.iteration, state.trainer))
    return CopyPlan("export", source.path, packer.files(), texts, ".", snapshots=(source.snapshot,))


def _tensors(source: Checkpoint) -> Iterator[tuple[str, Shape, TensorView]]:
    """Yield name and shape of each of OLMo-core's tensors, and a view of its elements in order."""
    parts: dict[str, list[tuple[StoredAs, TensorView]]] = defaultdict(list)
    for hf_name, shape in source.mapping.hf_shapes.items():
        stored = stored_as(hf_name, shape, source.bridge, dropless=True)
        parts[stored.name].append((stored, source.tensors[hf_name]))
    for name, [(stored, view), *others] in parts.items():
        if stored.expert is None:
            yield name, stored.shape, view
            continue
        pieces: list[Piece] = []
        for part, expert in [(stored, view), *others]:
            assert part.expert is not None
            pieces += expert.pieces_of(Region.whole(expert.shape), part.expert, part.transposed)
        yield name, stored.shape, TensorView.assembled(name, stored.shape, pieces)


def _packed(shape: Shape, view: TensorView, dtype: str, packer: Packer) -> GlobalTensor:
    """Pack a tensor as a single chunk; ``view`` may have another shape with the same order."""
    before, after = tensor_archive(shape, dtype)
    stored = _inside(packer.add(before, view, dtype, after))
    return GlobalTensor(dtype, shape, (Chunk((0,) * len(shape), shape, stored),))


def _packed_number(value: float, packer: Packer) -> GlobalTensor:
    before, after = tensor_archive((), "float32")
    stored = _inside(packer.add(before + struct.pack("<f", value) + after, None, "", b""))
    return GlobalTensor("float32", (), (Chunk((), (), stored),))


def _settings(name: str, state: OptimizerState) -> dict[str, Any]:
    """Return the settings of the optimizer for a parameter."""
    decays = {
        "all": True,
        "all_but_embeddings": name != EMBEDDING,
        "matrices": "norm" not in name,
    }[state.decayed]
    decay = state.settings["weight_decay"] if decays else 0.0
    return {**_ADAMW, **state.settings, "weight_decay": decay}


def _progress(iteration: int, trainer: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the trainer's file.

    OLMo-core restores random states only at the world size that they were saved at.
    """
    return {**trainer, "global_step": iteration, "world_size": 0, "rng": {}, "callbacks": {}}


def _inside(place: tuple[str, int, int]) -> StoredBytes:
    name, offset, length = place
    return StoredBytes(Path(name).name, offset, length)
