"""Checkpoints of OLMo's first trainer: ``stepN-unsharded`` with ``config.yaml`` and the model.

OLMo, and OLMo-2 1B, 7B and 13B, were trained by it. The weights are in ``model.safetensors`` or in
``model.pt``, whose pickle is read without running it. The optimizer state is not read.
"""

from __future__ import annotations

import base64
import binascii
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, quote
from megatron_olmo_bridge.formats.hf_folder import CONFIG, refuse_outside
from megatron_olmo_bridge.formats.pickles import loads
from megatron_olmo_bridge.formats.plain_yaml import read_yaml
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.safetensors import read_header
from megatron_olmo_bridge.formats.tensors import StoredArray, TensorView
from megatron_olmo_bridge.formats.torch_archive import arrays_by_name, read_archive
from megatron_olmo_bridge.mapping.mappings import numbered, split_numbers
from megatron_olmo_bridge.mapping.placement import Region, Shape
from megatron_olmo_bridge.mapping.registry import check_tensors
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.models.olmo_trainer_config import TRAINER_TENSORS, trainer_hf_config

from .checkpoint import Checkpoint, ReadOptions

TRAINER_CONFIG = "config.yaml"
SAFETENSORS, PICKLED = "model.safetensors", "model.pt"


@dataclass(frozen=True, kw_only=True)
class OLMoTrainerCheckpoint(Checkpoint):
    """A step of OLMo's first trainer; only its weights are read."""

    kind: ClassVar[str] = "OLMo trainer"
    looks_like: ClassVar[str] = f"{TRAINER_CONFIG} and {SAFETENSORS} or {PICKLED}"

    views: dict[str, TensorView]
    """Tensors of the Hugging Face model, each a range of rows of the trainer's."""

    @classmethod
    def find(cls, path: AnyPath, iteration: int | str | None) -> AnyPath | None:
        if not (path / TRAINER_CONFIG).is_file() or (path / CONFIG).exists():
            return None
        return path if any((path / name).is_file() for name in (SAFETENSORS, PICKLED)) else None

    @classmethod
    def file_patterns(cls, path: AnyPath) -> dict[AnyPath, tuple[str, ...]]:
        return {path: (TRAINER_CONFIG, SAFETENSORS, PICKLED)}

    @classmethod
    def open(cls, path: AnyPath, options: ReadOptions, strict: bool) -> OLMoTrainerCheckpoint:
        file = path / TRAINER_CONFIG
        refuse_outside(file, path)
        config = read_yaml(file)
        if not isinstance(config, dict):
            raise FormatError(f"{file}: does not hold a map")
        try:
            converted = trainer_hf_config(config)
        except BridgeError as error:
            raise type(error)(f"{file}: {error}") from error
        bridge = bridge_for(converted, file)
        arrays = _arrays(path)
        registry = bridge.mapping_registry()
        registry.check_size(len(arrays), path)
        mapping = registry.resolve()
        return cls(
            path=path,
            bridge=bridge,
            mapping=mapping,
            config_from=file,
            artifacts_folder=None,
            views=_views(arrays, mapping.hf_shapes, path),
        )

    @property
    def tensors(self) -> dict[str, TensorView]:
        return self.views

    @property
    def layout(self) -> str:
        return "a file of the trainer, q, k and v fused, up and gate too"


def _arrays(path: AnyPath) -> dict[str, StoredArray]:
    """Return the stored tensors by the trainer's names.

    Raises:
        InputError: the file doesn't hold tensors by name.
        FormatError, UnsafePickleError, UnsupportedError: it is damaged, or of another dtype.
    """
    file = path / SAFETENSORS
    if file.is_file():
        return {_decoded(key, file): array for key, array in read_header(file).items()}
    file = path / PICKLED
    arrays = arrays_by_name(read_archive(file), file)
    if arrays is None:
        raise InputError(f"{file}: not a model of OLMo's trainer: it has no tensors by name")
    return arrays


def _decoded(key: str, file: AnyPath) -> str:
    """Return the name that a key encodes: base64 of a pickle of ``((name,), False)``.

    The trainer encodes names so (``olmo/safetensors_util.py``). Plain names are returned as they
    are.
    """
    if "." in key:  # not in base64
        return key
    try:
        names, is_pickled = loads(base64.urlsafe_b64decode(key), file)
        (name,) = names
    except (binascii.Error, TypeError, ValueError) as error:
        raise FormatError(f"{file}: {quote(key)} is not the name of a tensor") from error
    if not isinstance(name, str) or is_pickled is not False:
        raise FormatError(f"{file}: {quote(key)} is not the name of a tensor")
    return name


def _views(
    arrays: dict[str, StoredArray], hf_shapes: dict[str, Shape], path: AnyPath
) -> dict[str, TensorView]:
    """Return every Hugging Face tensor: its rows of the trainer's tensor.

    Raises:
        MappingError: tensors are missing, unexpected, or have the wrong shape.
    """
    parts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for hf_name in hf_shapes:
        pattern, index = split_numbers(hf_name)
        name, place = TRAINER_TENSORS[pattern]
        parts[numbered(name, index)].append((place, hf_name))
    expected = {
        name: (sum(hf_shapes[hf][0] for _, hf in fused), *hf_shapes[fused[0][1]][1:])
        for name, fused in parts.items()
    }
    check_tensors(expected, {name: array.shape for name, array in arrays.items()}, path)
    views = {}
    for name, fused in parts.items():
        whole, top = TensorView.of_array(name, arrays[name]), 0
        for _, hf_name in sorted(fused):
            shape = hf_shapes[hf_name]
            rows = Region.whole(shape)
            part = whole.pieces_of(rows._replace(top=top, bottom=top + rows.rows), rows)
            views[hf_name] = TensorView.assembled(hf_name, shape, part)
            top += rows.rows
    return {hf_name: views[hf_name] for hf_name in hf_shapes}
