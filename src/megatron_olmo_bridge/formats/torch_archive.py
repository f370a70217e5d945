"""The archives that ``torch.save`` writes: a stored zip with a pickle and a record per storage.

Written by hand so that a tensor's payload can be copied into place by the kernel; read by headers
so that no payload is touched. Layout as ``torch.load`` reads it, plain and with ``mmap=True``:
zip64 throughout, payload aligned to 64 bytes by an 'FB' extra field, a zero CRC on the payload
(torch doesn't check it).
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import FormatError, quote
from megatron_olmo_bridge.mapping.placement import Shape

from .files import PICKLE_LIMIT, open_regular
from .inert import Inert, inert, is_class
from .pickles import Persistent, dumps, loads
from .tensors import ITEM_SIZE, StoredArray
from .zip_directory import Record, Window, read_directory

ALIGNMENT = 64
_STORAGE = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
MOST_DIMENSIONS = 64
"""Of a tensor, in PyTorch too."""
_DTYPE = {f"torch.{storage}": dtype for dtype, storage in _STORAGE.items()}


def tensor_archive(shape: Shape, dtype: str) -> tuple[bytes, bytes]:
    """What stands before and after the payload of a contiguous tensor's archive."""
    count = math.prod(shape)
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.insert(0, step)
        step *= extent
    storage = Persistent(("storage", inert(f"torch.{_STORAGE[dtype]}"), "0", "cpu", count))
    tensor = inert("torch._utils._rebuild_tensor_v2")(
        storage, 0, shape, tuple(strides), False, inert("collections.OrderedDict")()
    )
    return _archive(dumps(tensor), count * ITEM_SIZE[dtype])


def object_archive(value: Any) -> bytes:
    """A whole archive of a value without tensors."""
    return b"".join(_archive(dumps(value), None))


def _archive(pickled: bytes, payload: int | None) -> tuple[bytes, bytes]:
    """The bytes before and after the payload; with none, all of them and nothing."""
    records: list[tuple[str, bytes | None]] = [
        ("archive/data.pkl", pickled),
        ("archive/byteorder", b"little"),
        *([("archive/data/0", None)] if payload is not None else []),
        ("archive/version", b"3\n"),
    ]
    before, after, directory = bytearray(), bytearray(), bytearray()
    part, position = before, 0
    for name, data in records:
        encoded = name.encode()
        size = len(data) if data is not None else payload or 0
        crc = zlib.crc32(data) if data is not None else 0
        zip64 = struct.pack("<HHQQ", 1, 16, size, size)
        padding = -(position + 30 + len(encoded) + len(zip64) + 4) % ALIGNMENT
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        header = struct.pack(
            "<IHHHHHIIIHH",
            0x04034B50,
            45,
            0,
            0,
            0,
            0,
            crc,
            2**32 - 1,
            2**32 - 1,
            len(encoded),
            len(extra),
        )
        central = struct.pack("<HHQQQ", 1, 24, size, size, position)
        directory += struct.pack(
            "<IHHHHHHIIIHHHHHII",
            0x02014B50,
            45,
            45,
            0,
            0,
            0,
            0,
            crc,
            2**32 - 1,
            2**32 - 1,
            len(encoded),
            len(central),
            0,
            0,
            0,
            0,
            2**32 - 1,
        )
        directory += encoded + central
        part += header + encoded + extra
        position += len(header) + len(encoded) + len(extra) + size
        if data is None:
            part = after
        else:
            part += data
    end = position + len(directory)
    part += directory
    part += struct.pack(
        "<IQHHIIQQQQ",
        0x06064B50,
        44,
        45,
        45,
        0,
        0,
        len(records),
        len(records),
        len(directory),
        position,
    )
    part += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    part += struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, len(records), len(records), len(directory), 2**32 - 1, 0
    )
    return bytes(before), bytes(after)


@dataclass(frozen=True)
class StoredStorage:
    """A storage record of an archive: where its bytes are."""

    dtype: str
    offset: int
    count: int


def read_archive(
    file: Path, offset: int = 0, length: int | None = None, *, any_classes: bool = False
) -> Any:
    """The pickled value of an archive that takes ``length`` bytes of a file; storages as
    :class:`StoredStorage`. ``any_classes`` as for :func:`pickles.loads`.

    Raises:
        FormatError: truncated, compressed, big-endian or not an archive.
        UnsafePickleError: its pickle names a global that is not on the allow-list.
    """
    where = f"{file} at byte {offset}" if offset else str(file)
    with open_regular(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        length = size - offset if length is None else length
        if offset + length > size:
            raise FormatError(f"{file}: truncated: {size} bytes, needs {offset + length}")
        try:
            window = Window(handle, offset, length)
            records = read_directory(window)
            pickled = _pickle_of(window, records)
        except (ValueError, struct.error) as error:
            raise FormatError(f"{where}: not an archive of torch.save ({error})") from error
    return loads(pickled, where, _storages(records, where), any_classes=any_classes)


def _pickle_of(window: Window, records: Mapping[str, Record]) -> bytes:
    if "data.pkl" not in records or "constants.pkl" in records:  # of TorchScript, which torch runs
        raise ValueError("the archive has no data.pkl, or is a TorchScript program")
    byteorder = records.get("byteorder")
    if byteorder and window.content(byteorder, 16) != b"little":
        raise ValueError("big-endian tensors can't be read")
    return window.content(records["data.pkl"], PICKLE_LIMIT)


def _storages(
    records: Mapping[str, Record], where: str
) -> Callable[[tuple[Any, ...]], StoredStorage]:
    """What finds storages by their persistent ids."""
    found: dict[str, StoredStorage] = {}

    def storage(pid: tuple[Any, ...]) -> StoredStorage:
        match pid:
            case ("storage", kind, str() as key, _, int() as count) if is_class(kind):
                record = records.get(f"data/{key}".lower())
            case _:
                raise FormatError(f"{where}: {quote(pid)} is not a storage")
        if record is None:
            raise FormatError(f"{where}: has no record {quote(f'data/{key}')}")
        dtype = _DTYPE.get(kind.global_name, kind.global_name)
        if dtype in ITEM_SIZE and record.size != count * ITEM_SIZE[dtype]:
            raise FormatError(f"{where}: {record.size} bytes cannot hold {quote(count)} x {dtype}")
        new = StoredStorage(dtype, record.offset, count)
        if found.setdefault(key, new) != new:  # torch takes the first for all
            raise FormatError(f"{where}: storage {quote(key)} is of two dtypes or sizes")
        return new

    return storage


def read_tensor(file: Path, offset: int, length: int) -> StoredArray:
    """Where the elements of an archived tensor are.

    Raises:
        FormatError: not a plain contiguous tensor of a dtype that weights have.
    """
    return array_of(read_archive(file, offset, length), file, f"{file} at byte {offset}")


def array_of(value: Any, file: Path, where: str) -> StoredArray:
    """Where the elements of a tensor are, that :func:`read_archive` found in a file.

    Raises:
        FormatError: not a plain contiguous tensor of a dtype that weights have.
    """
    if _calls(value, "torch._utils._rebuild_parameter") and value.args:
        value = value.args[0]
    if not _calls(value, "torch._utils._rebuild_tensor_v2"):
        raise FormatError(f"{where}: holds {_kind(value)}, not a plain tensor")
    storage, start, shape, strides, _, _, metadata = (*value.args, *[None] * 7)[:7]
    if _calls(shape, "torch.Size") and shape.args:
        shape = shape.args[0]
    tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
    if not (tuples and isinstance(storage, StoredStorage)) or any(
        type(n) is not int or not 0 <= n < 2**63 for n in (start, *shape, *strides)
    ):
        raise FormatError(f"{where}: holds {_kind(value)}, which is no tensor")
    if metadata not in (None, {}) or len(value.args) > 7:
        raise FormatError(
            f"{where}: the tensor is a view that negates or conjugates its elements, or has other "
            f"metadata: {quote(metadata)}. Save it after tensor.resolve_neg().resolve_conj()."
        )
    if storage.dtype not in ITEM_SIZE:
        raise FormatError(f"{where}: tensors of {storage.dtype} are not converted")
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise FormatError(f"{where}: shape {quote(shape)} and strides {quote(strides)} don't fit")
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != step:
            raise FormatError(f"{where}: the tensor is not contiguous (strides {quote(strides)})")
        step *= extent
    if start + step > storage.count:
        raise FormatError(f"{where}: the tensor is larger than its storage")
    return StoredArray(
        file, storage.offset + start * ITEM_SIZE[storage.dtype], tuple(shape), storage.dtype
    )


def _calls(value: Any, name: str) -> bool:
    """Whether a value read from a pickle is the call of this global, and was not changed since."""
    return (
        isinstance(value, Inert)
        and value.global_name == name
        and value.state is None
        and not value.items
        and not value.members
    )


def _kind(value: Any) -> str:
    return value.global_name if isinstance(value, Inert) else quote(value, depth=0)
