"""The archives that ``torch.save`` writes: a stored zip with a pickle and a record per storage.

Written by hand so that a tensor's payload can be copied into place by the kernel; read by headers
so that no payload is touched. Layout as ``torch.load`` reads it, plain and with ``mmap=True``:
zip64 throughout, payload aligned to 64 bytes by an 'FB' extra field, a zero CRC on the payload
(torch doesn't check it).
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.mapping.placement import Shape

from .pickles import Inert, Persistent, dumps, inert, loads
from .tensors import ITEM_SIZE, StoredArray

ALIGNMENT = 64
_STORAGE = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
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
        ("archive/data.pkl", pickled), ("archive/byteorder", b"little"),
        *([("archive/data/0", None)] if payload is not None else []),
        ("archive/version", b"3\n"),
    ]  # fmt: skip
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
            "<IHHHHHIIIHH", 0x04034B50, 45, 0, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1,
            len(encoded), len(extra),
        )  # fmt: skip
        central = struct.pack("<HHQQQ", 1, 24, size, size, position)
        directory += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 45, 45, 0, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1,
            len(encoded), len(central), 0, 0, 0, 0, 2**32 - 1,
        )  # fmt: skip
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
        "<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, len(records), len(records),
        len(directory), position,
    )  # fmt: skip
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
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        length = size - offset if length is None else length
        if offset + length > size:
            raise FormatError(f"{file}: truncated: {size} bytes, needs {offset + length}")
        window = io.BufferedReader(_Window(handle, offset, length))
        try:
            with zipfile.ZipFile(window) as archive:
                return _read_zip(archive, window, offset, where, any_classes)
        except (
            zipfile.BadZipFile, struct.error, LookupError, ValueError, OverflowError, RuntimeError,
            EOFError,
        ) as error:  # fmt: skip
            raise FormatError(f"{where}: not an archive of torch.save ({error})") from error


def _read_zip(
    archive: zipfile.ZipFile, window: BinaryIO, offset: int, where: str, any_classes: bool
) -> Any:
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise FormatError(f"{where}: the archive is compressed")
    if "data.pkl" not in records:
        raise FormatError(f"{where}: the archive has no data.pkl")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise FormatError(f"{where}: big-endian tensors can't be read")

    def storage(pid: tuple[Any, ...]) -> StoredStorage:
        kind, key, count = pid[1].global_name, pid[2], pid[4]
        info = records[f"data/{key}"]
        dtype = _DTYPE.get(kind, kind)
        if info.file_size != count * ITEM_SIZE.get(dtype, 0) and dtype in ITEM_SIZE:
            raise FormatError(f"{where}: {info.file_size} bytes cannot hold {count} x {dtype}")
        window.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", window.read(4))
        at = info.header_offset + 30 + name + extra
        if at + info.file_size > window.seek(0, os.SEEK_END):
            raise FormatError(f"{where}: storage {key} ends after the archive")
        return StoredStorage(dtype, offset + at, count)

    return loads(archive.read(records["data.pkl"]), where, storage, any_classes=any_classes)


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
        raise FormatError(f"{where}: holds {value!r:.80}, not a plain tensor")
    storage, start, shape, strides = (*value.args, None, None, None, None)[:4]
    if _calls(shape, "torch.Size") and shape.args:
        shape = shape.args[0]
    tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
    if not (tuples and isinstance(storage, StoredStorage)) or any(
        type(n) is not int or n < 0 for n in (start, *shape, *strides)
    ):
        raise FormatError(f"{where}: holds {value!r:.80}, which is no tensor")
    if storage.dtype not in ITEM_SIZE:
        raise FormatError(f"{where}: tensors of {storage.dtype} are not converted")
    if len(shape) != len(strides):
        raise FormatError(f"{where}: shape {shape} and strides {strides} don't fit")
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != step:
            raise FormatError(f"{where}: the tensor is not contiguous (strides {strides})")
        step *= extent
    if start + step > storage.count:
        raise FormatError(f"{where}: the tensor is larger than its storage")
    return StoredArray(
        file, storage.offset + start * ITEM_SIZE[storage.dtype], tuple(shape), storage.dtype
    )


def _calls(value: Any, name: str) -> bool:
    """Whether a value read from a pickle is the call of this global."""
    return isinstance(value, Inert) and value.global_name == name


class _Window(io.RawIOBase):
    """Part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + position)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        if not view:
            return 0
        self._file.seek(self._offset + self._position)
        data = self._file.read(len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
