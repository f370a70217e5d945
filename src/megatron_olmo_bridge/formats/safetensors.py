"""Read and write headers of safetensors files; every offset is checked against the file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from megatron_olmo_bridge.errors import FormatError, UnsupportedError, quote
from megatron_olmo_bridge.mapping.placement import Shape

from .files import JSON_LIMIT, open_regular, parse_json, size_of
from .remote_path import AnyPath
from .tensors import ITEM_SIZE, StoredArray

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_QUANTISED = {"I8", "U8", "I32", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"}
_BITS = {
    code: bits
    for bits, codes in {
        4: ("F4",),
        6: ("F6_E2M3", "F6_E3M2"),
        8: ("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
        16: ("F16", "BF16", "I16", "U16"),
        32: ("F32", "I32", "U32"),
        64: ("F64", "I64", "U64", "C64"),
    }.items()
    for code in codes
}
"""Bits per element of every dtype of the format."""
MAX_DIMENSIONS = 8
MAX_NAME = 500
"""Characters."""
_LARGEST = 2**63 - 1
"""Upper limit of dimensions and offsets."""


def read_header(
    file: AnyPath, is_buffer: Callable[[str], bool] = lambda _: False
) -> dict[str, StoredArray]:
    """Return every tensor of a safetensors file, in the order of the header.

    Args:
        file: the file.
        is_buffer: says by its name whether a tensor is a buffer, not a weight. A buffer of another
            dtype than weights are converted in is left out.

    Raises:
        FormatError: the file is truncated, or its header not sound; names the file and the tensor.
        UnsupportedError: a tensor has a dtype that weights are not converted in.
    """
    with open_regular(file) as handle:
        size = size_of(handle)
        head = handle.read(8)
        if len(head) < 8:
            raise FormatError(f"{file}: truncated: {size} bytes are too few for a safetensors file")
        (length,) = struct.unpack("<Q", head)
        if length > size - 8:
            raise FormatError(
                f"{file}: truncated or not a safetensors file: its header would be {length} bytes "
                f"long, the file has {size}"
            )
        if length > JSON_LIMIT:
            raise FormatError(
                f"{file}: its header has {length:,} bytes; headers are read up to {JSON_LIMIT:,}"
            )
        text = handle.read(length)
    header = parse_json(text, f"{file}: header")
    if not isinstance(header, dict):
        raise FormatError(f"{file}: header: not sound JSON: it is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{file}: header: __metadata__ is not an object of strings")
    room = size - 8 - length
    spans = {
        name: _span(file, name, entry, room, is_buffer(name)) for name, entry in header.items()
    }
    position = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            how = "overlaps what stands" if begin < position else "leaves a gap"
            raise FormatError(f"{file}: tensor {name} at bytes {begin} to {end} {how} before it")
        position = end
    if position != room:
        raise FormatError(f"{file}: has {room - position} bytes after its last tensor")
    return {
        name: StoredArray(file, 8 + length + begin, shape, dtype)
        for name, (dtype, shape, begin, _) in spans.items()
        if dtype in ITEM_SIZE
    }


def _span(
    file: AnyPath, name: str, entry: Any, room: int, any_dtype: bool
) -> tuple[str, Shape, int, int]:
    """Return the dtype and shape of a header's entry, and where its bytes begin and end."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        named = f"{quote(name)} is not the name of a tensor: 1 to {MAX_NAME} printable characters"
        raise FormatError(f"{file}: {named}")
    match entry:
        case {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise FormatError(f"{file}: tensor {name}: the header's entry is not sound")
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{file}: tensor {name} has {len(shape):,} dimensions")
    numbers = (*shape, begin, end)
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) > _LARGEST:
        raise FormatError(
            f"{file}: tensor {name}: its shape or offsets are not whole numbers of 0 to {_LARGEST}"
        )
    if not isinstance(code, str) or code not in _BITS:
        raise FormatError(f"{file}: tensor {name} has the unknown dtype {quote(code)}")
    if code in _QUANTISED and not any_dtype:
        raise UnsupportedError(
            f"{file}: tensor {name} is {code}: quantized weights can't be converted. "
            "Use the unquantized checkpoint."
        )
    if code not in DTYPES and not any_dtype:
        raise UnsupportedError(f"{file}: tensor {name} is {code}; weights are {sorted(DTYPES)}")
    dtype = DTYPES.get(code, code)
    if 8 * (end - begin) != math.prod(shape) * _BITS[code]:
        raise FormatError(
            f"{file}: tensor {name}: {end - begin} bytes (offsets {begin} to {end}) can't hold "
            f"shape {shape} of {dtype}"
        )
    if end > room:
        raise FormatError(
            f"{file}: truncated: tensor {name} ends at byte {end} of its tensors, it has {room}"
        )
    return dtype, tuple(shape), begin, end


def write_header(
    tensors: Mapping[str, tuple[str, Shape]], residue: int | None = None, block: int = 8
) -> bytes:
    """Return the header of a file that holds these tensors, one after the other.

    It is padded to 8 bytes and has the metadata that ``save_pretrained`` writes.

    Args:
        tensors: dtype and shape by name.
        residue: length modulo ``block`` to pad the header to; a multiple of 8.
        block: a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * ITEM_SIZE[dtype]
        offsets = [position, end]
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": offsets}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 if residue is None else (residue - 8 - len(text)) % block)
    return struct.pack("<Q", len(text)) + text
