"""``.metadata`` of torch.distributed.checkpoint: where each chunk of each tensor is stored."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron_olmo_bridge.errors import FormatError, UnsupportedError, quote
from megatron_olmo_bridge.mapping.placement import Shape

from .files import PICKLE_LIMIT, is_file_name, read_small
from .inert import Inert, built, inert
from .pickles import dumps, loads
from .remote_path import AnyPath, for_each
from .torch_archive import MAX_DIMENSIONS

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint.metadata"
_LONGEST_KEY = 1000
MASTER_WEIGHT = re.compile(r"optimizer\.state\.(fp32_)?param\.")
"""Prefix of the float32 weights that an optimizer updates. megatron-core's distributed optimizer
calls them ``param``, the other one ``fp32_param``."""
_LIMIT = 2**63
"""Upper bound of offsets, extents and element counts, as in PyTorch."""


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a ``.distcp`` file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A block of a global tensor."""

    offset: Shape
    shape: Shape
    stored: StoredBytes


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor as ``.metadata`` describes it."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


_Places = dict[str, dict[Shape | None, StoredBytes]]
"""Stored bytes by the key of a tensor or object, then by the offset of the chunk."""


def read_metadata(path: AnyPath) -> tuple[dict[str, GlobalTensor], dict[str, StoredBytes]]:
    """Return a checkpoint's tensors and its other objects, by key.

    Raises:
        FormatError: damaged; a chunk is outside its tensor, its file or the folder; or two chunks
            share bytes.
        UnsafePickleError: the pickle names a class or function that is not allowed.
        UnsupportedError: the files are compressed or encrypted.
    """
    file = path / METADATA
    try:
        metadata = _attributes(loads(read_small(file, PICKLE_LIMIT), file), "Metadata")
        places = _places(metadata.get("storage_data") or {}, file)
        tensors, objects = _described(metadata.get("state_dict_metadata") or {}, places, file)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        # Only messages of this file are known to be short.
        ours = type(error) is ValueError
        why = str(error) if ours else f"{type(error).__name__} {quote(error.args)}"
        message = f"{file}: not the metadata of a distributed checkpoint ({why})"
        raise FormatError(message) from error
    _check_files(path, places)
    return tensors, objects


def _attributes(value: Any, kind: str) -> dict[str, Any]:
    """Return the attributes of an object, whose class must have the name ``kind``."""
    if not isinstance(value, Inert) or type(value).__name__ != kind:
        raise ValueError(f"{quote(value)} is not a {kind}")
    if not isinstance(value.state, dict):
        raise ValueError(f"a {kind} has no attributes")
    return value.state


def _check_key(key: Any) -> None:
    if not (isinstance(key, str) and key.isprintable() and len(key) <= _LONGEST_KEY):
        raise ValueError(f"{quote(key)} is not the name of a tensor")


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise ValueError(f"{quote(value)} is not a size")
    return value


def _shape(value: Any) -> Shape:
    numbers = value.args[0] if isinstance(value, Inert) else value
    if not isinstance(numbers, list | tuple) or len(numbers) > MAX_DIMENSIONS:
        raise ValueError(f"{quote(numbers)} is not a shape")
    return tuple(map(_number, numbers))


def _places(storage: Mapping[Any, Any], file: AnyPath) -> _Places:
    places: _Places = defaultdict(dict)
    for index, info in storage.items():
        key, value = _attributes(index, "MetadataIndex"), _attributes(info, "_StorageInfo")
        name, offset = value["relative_path"], key.get("offset")
        _check_key(key["fqn"])
        if value.get("transform_descriptors"):
            raise UnsupportedError(
                f"{file}: {key['fqn']} is stored compressed or encrypted. Save the checkpoint "
                "without extensions of torch.distributed.checkpoint."
            )
        if not is_file_name(name):
            raise FormatError(f"{file}: {key['fqn']} would be in {quote(name)}, outside the folder")
        try:
            at = StoredBytes(name, _number(value["offset"]), _number(value["length"]))
            places[key["fqn"]][None if offset is None else _shape(offset)] = at
        except ValueError as error:
            raise ValueError(f"{key['fqn']} in {name}: {error}") from None
    return dict(places)


def _described(
    metadata: Mapping[Any, Any], places: _Places, file: AnyPath
) -> tuple[dict[str, GlobalTensor], dict[str, StoredBytes]]:
    tensors, objects = {}, {}
    for key, value in metadata.items():
        _check_key(key)
        stored = places.get(key, {})
        if value.global_name.endswith(".BytesStorageMetadata"):
            if not stored:
                raise FormatError(f"{file}: does not say where {key} is stored")
            objects[key] = next(iter(stored.values()))
            continue
        try:
            tensors[key] = _global_tensor(key, value, stored, file)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return tensors, objects


def _global_tensor(
    key: str, metadata: Any, places: Mapping[Shape | None, StoredBytes], file: AnyPath
) -> GlobalTensor:
    value = _attributes(metadata, "TensorStorageMetadata")
    # TensorProperties.__getstate__ of torch: a tuple that begins with the dtype
    state = value["properties"].state
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    shape = _shape(value["size"])
    if math.prod(shape) >= _LIMIT:
        raise FormatError(f"{file}: {key}: no tensor has the shape {quote(shape)}")
    chunks = []
    for chunk in value["chunks"]:
        fields = _attributes(chunk, "ChunkStorageMetadata")
        offset, extents = _shape(fields["offsets"]), _shape(fields["sizes"])
        if offset not in places:
            raise FormatError(f"{file}: does not say where {key} at {list(offset)} is stored")
        if not len(offset) == len(extents) == len(shape):
            raise FormatError(f"{file}: {key}: its chunks have other dimensions than its shape")
        if any(at + n > whole for at, n, whole in zip(offset, extents, shape, strict=True)):
            raise FormatError(
                f"{file}: {key}: its chunk {quote(extents)} at {quote(offset)} reaches beyond its "
                f"shape {quote(shape)}"
            )
        chunks.append(Chunk(offset, extents, places[offset]))
    return GlobalTensor(dtype.global_name.removeprefix("torch."), shape, tuple(chunks))


def _check_files(path: AnyPath, places: _Places) -> None:
    """Raise FormatError if a file is truncated, or two chunks share bytes of it.

    Only a weight and its float32 copy in an optimizer may be stored once. Absent files are not
    checked: they may hold only what is not read.
    """
    found = sorted(
        {
            (at.file, at.offset, at.offset + at.length, MASTER_WEIGHT.sub("", key), offset or ())
            for key, by_offset in places.items()
            for offset, at in by_offset.items()
            if at.length
        }
    )
    names = sorted({name for name, *_ in found})
    is_there = dict(zip(names, for_each(lambda n: (path / n).is_file(), names, path), strict=True))
    for (name, _, end, key, _), (name_after, begin, _, key_after, _) in pairwise(
        [*found, ("", 0, 0, "", ())]
    ):
        file = path / name
        if name == name_after:
            if begin < end:
                raise FormatError(
                    f"{file}: {key} and {key_after} would share bytes {begin} to {end} of it"
                )
        elif is_there[name] and (size := file.stat().st_size) < end:
            raise FormatError(f"{file}: truncated: {key} ends at byte {end}, the file has {size}")


def encode_metadata(
    tensors: Mapping[str, GlobalTensor],
    objects: Mapping[str, StoredBytes],
    paths: Mapping[str, tuple[str, ...]] | None = None,
) -> bytes:
    """Return the content of ``.metadata``: a pickle that torch reads as ``Metadata``.

    Args:
        tensors: tensors by key.
        objects: other objects by key.
        paths: path of each key in the nested state dict that was flattened to these keys.
    """

    def dcp(name: str, **attributes: Any) -> Inert:
        return built(f"{_DCP}.{name}", attributes)

    def size(shape: Shape) -> Inert:
        return inert("torch.Size")(tuple(shape))

    def index(key: str, offset: Shape | None) -> Inert:
        at = None if offset is None else size(offset)
        return dcp("MetadataIndex", fqn=key, offset=at, index=None)

    def info(at: StoredBytes) -> Inert:
        fields = {"relative_path": at.file, "offset": at.offset, "length": at.length}
        return built("torch.distributed.checkpoint.filesystem._StorageInfo", fields)

    def described(tensor: GlobalTensor) -> Inert:
        # TensorProperties.__getstate__: dtype, layout, requires_grad, memory format, pin_memory
        layout = inert("torch.serialization._get_layout")("torch.strided")
        memory = inert(f"{_DCP}._MEM_FORMAT_ENCODING")(0)
        properties = inert(f"torch.{tensor.dtype}"), layout, False, memory, False
        return dcp(
            "TensorStorageMetadata",
            properties=built(f"{_DCP}.TensorProperties", properties),
            size=size(tensor.shape),
            chunks=[
                dcp("ChunkStorageMetadata", offsets=size(c.offset), sizes=size(c.shape))
                for c in tensor.chunks
            ],
        )

    metadata = dcp(
        "Metadata",
        state_dict_metadata={key: described(tensor) for key, tensor in tensors.items()}
        | {key: dcp("BytesStorageMetadata") for key in objects},
        planner_data=paths if paths is None else dict(paths),
        storage_data={
            index(key, c.offset): info(c.stored) for key, t in tensors.items() for c in t.chunks
        }
        | {index(key, None): info(at) for key, at in objects.items()},
        storage_meta=None,
        version=None,
    )
    return dumps(metadata)
