"""The records of a stored zip, found as PyTorch's reader (miniz) finds them, by the directory.

Where two readers could take the same bytes for different records (names twice, headers that differ
from the directory, records that overlap), the archive is refused.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

LARGEST_DIRECTORY = 4 * 2**20
"""Bytes: some 50,000 records. An archive has one for each tensor."""
_END = struct.Struct("<IHHHHIIH")
_END64_AT = struct.Struct("<IIQI")
_END64 = struct.Struct("<IQHHIIQQQQ")
_ENTRY = struct.Struct("<IHHHHHHIIIHHHHHII")
_HEADER = struct.Struct("<IHHHHHIIIHH")
_UNKNOWN = 2**32 - 1
"""Stands in a 32-bit field whose number is in the zip64 extra field."""
_FLAGS = 0x0808
"""Flags that may be set: sizes after the record, a name in UTF-8. Others encrypt or compress."""
_IS_FOLDER = 0x10
"""MS-DOS attribute of a folder. PyTorch's reader takes such a record for an empty one."""


@dataclass(frozen=True)
class Record:
    """The bytes of a stored record."""

    name: str
    offset: int
    """In the file."""
    size: int
    crc: int
    """CRC-32 from the directory; torch ignores it."""


@dataclass(frozen=True)
class Window:
    """An archive: part of a file."""

    file: BinaryIO
    offset: int
    length: int

    def read(self, at: int, size: int) -> bytes:
        """Bytes of the archive.

        Raises:
            ValueError: it doesn't have them.
        """
        if min(at, size) < 0 or at + size > self.length:
            raise ValueError(f"it has {self.length} bytes, not {size} from byte {at} on")
        data = os.pread(self.file.fileno(), size, self.offset + at)
        if len(data) != size:
            raise ValueError("it became shorter while it was read")
        return data

    def content(self, record: Record, most: int) -> bytes:
        """A small record whole.

        Raises:
            ValueError: it is larger than ``most`` bytes, or not what was written.
        """
        if record.size > most:
            raise ValueError(f"{record.name} has {record.size} bytes; at most {most} are read")
        data = self.read(record.offset - self.offset, record.size)
        if zlib.crc32(data) != record.crc:
            raise ValueError(f"{record.name} is not what was written: its checksum differs")
        return data


def read_directory(window: Window) -> dict[str, Record]:
    """Every record by its name without the archive's own, in lower case: miniz finds them so.

    Raises:
        ValueError: it is not a sound zip of stored records, under one folder, that begins with one.
    """
    count, size, start = _extent(window)
    if size > LARGEST_DIRECTORY:
        raise ValueError(f"a directory of {size} bytes; at most {LARGEST_DIRECTORY} are read")
    directory = window.read(start, size)
    records: dict[str, Record] = {}
    extents: list[tuple[int, int]] = []
    root, position = "", 0
    for _ in range(count):
        name, header, record_size, crc, position = _entry(directory, position)
        folder, _, key = name.partition("/")
        if (records and folder != root) or key.lower() in records:
            raise ValueError(f"{key} is in it twice, or not in the folder of the others")
        at = _payload(window, header, name)
        root = folder
        records[key.lower()] = Record(key, window.offset + at, record_size, crc)
        extents.append((header, at + record_size))
    extents.sort()
    starts = [begin for begin, _ in extents[1:]] + [start]
    if position != size or not extents or extents[0][0] != 0:
        raise ValueError("its directory is not that of its records")
    if any(end > begin for (_, end), begin in zip(extents, starts, strict=True)):
        raise ValueError("its records overlap")
    return records


def _extent(window: Window) -> tuple[int, int, int]:
    """How many records the directory has, its bytes, and where it begins."""
    at = window.length - _END.size
    found = _END.unpack(window.read(at, _END.size))
    if found[0] != 0x06054B50:
        raise ValueError("it has no directory at its end: it is cut off, or not a zip")
    disks, (count, size, start) = found[1:3], found[4:7]
    if at >= _END64_AT.size:
        signature, _, end64, _ = _END64_AT.unpack(window.read(at - _END64_AT.size, _END64_AT.size))
        if signature == 0x07064B50:
            at = end64
            found64 = _END64.unpack(window.read(at, _END64.size))
            if found64[0] != 0x06064B50:
                raise ValueError("its directory is damaged")
            disks, (count, size, start) = found64[4:6], found64[7:10]
    if start + size != at or any(disks):
        raise ValueError("its directory is not where it should be")
    return count, size, start


def _entry(directory: bytes, position: int) -> tuple[str, int, int, int, int]:
    """Name, place of the header, size and CRC of a record, and where the next entry begins."""
    fields = _ENTRY.unpack_from(directory, position)
    (
        signature,
        _,
        _,
        flags,
        method,
        _,
        _,
        crc,
        packed,
        size,
        name,
        extra,
        comment,
        disk,
        _,
        attributes,
        header,
    ) = fields
    if signature != 0x02014B50:
        raise ValueError("its directory is damaged")
    position += _ENTRY.size
    text = directory[position : position + name].decode()
    numbers = _zip64(directory[position + name : position + name + extra])
    size, packed, header = (next(numbers) if n == _UNKNOWN else n for n in (size, packed, header))
    if method or flags & ~_FLAGS or packed != size:
        raise ValueError("the archive is compressed or encrypted")
    if disk or attributes & _IS_FOLDER or text.endswith("/"):
        raise ValueError(f"{text} is a folder, or in another archive")
    return text, header, size, crc, position + name + extra + comment


def _zip64(extra: bytes) -> Iterator[int]:
    """The numbers of the zip64 extra field, in their order."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            content = extra[position + 4 : position + 4 + size]
            yield from (n for (n,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8]))
            break
        position += 4 + size
    raise ValueError("its directory lacks a number")


def _payload(window: Window, header: int, name: str) -> int:
    """Where a record's bytes begin."""
    encoded = name.encode()
    found: tuple[int, ...] = _HEADER.unpack(window.read(header, _HEADER.size))
    size, extra = found[9:11]
    text = window.read(header + _HEADER.size, size)
    if found[0] != 0x04034B50 or found[3] or text != encoded:
        raise ValueError(f"the header of {name} is not what the directory says")
    return header + _HEADER.size + size + extra
