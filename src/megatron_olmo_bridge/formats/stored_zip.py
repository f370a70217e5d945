"""Zip archives of stored (uncompressed) records, written and read without their payloads.

Records are found as PyTorch's reader (miniz) finds them: by the directory at the end. Where two
readers could take the same bytes for different records (a name twice, a header that differs from
the directory, records that overlap), the archive is refused.

Source of the layout: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import BinaryIO

MAX_DIRECTORY_BYTES = 4 * 2**20
"""Some 50,000 records. An archive has one for each tensor."""
ALIGNMENT = 64
"""Each record's data begins at a multiple of it, as ``torch.save`` aligns them for mmap."""
_HEADER_MARK, _ENTRY_MARK, _END_MARK = 0x04034B50, 0x02014B50, 0x06054B50
_END64_MARK, _END64_AT_MARK = 0x06064B50, 0x07064B50
_HEADER = Struct("<IHHH4xIIIHH")
"""Before a record: mark, version, flags, method, CRC, packed size, size, lengths of the name and of
the extra fields."""
_ENTRY = Struct("<IHHHH4xIIIHHHH2xII")
"""In the directory: mark, writer's version, the header's fields, length of a comment, disk,
attributes, position of the header."""
_END = Struct("<IHHHHIIH")
"""Mark, two disks, two counts of records, size and position of the directory, comment's length."""
_END64 = Struct("<IQHHIIQQQQ")
"""Mark, bytes that follow, two versions, then as above."""
_END64_AT = Struct("<IIQI")
"""Mark, disk, position of the zip64 end, count of disks."""
_EXTRA = Struct("<HH")
"""Kind and size of an extra field."""
_ZIP64_KIND, _ZIP64_VERSION = 1, 45
_UNKNOWN = 2**32 - 1
"""Stands in a 32-bit field whose number is in the zip64 extra field."""
_FLAGS = 0x0808
"""Flags that may be set: sizes after the record, a name in UTF-8. Others encrypt or compress."""
_IS_FOLDER = 0x10
"""MS-DOS attribute of a folder. PyTorch's reader takes such a record for an empty one."""


def encode_around(records: Mapping[str, bytes | None], payload: int = 0) -> tuple[bytes, bytes]:
    """Return the bytes before and after the payload of an archive, in zip64 throughout.

    Without a payload, the first are the whole archive.

    Args:
        records: data by name, in order; None for the payload, whose CRC is written as 0 (torch
            does not check it).
        payload: bytes of the payload.
    """
    before, after, directory = bytearray(), bytearray(), bytearray()
    part, position = before, 0
    for name, data in records.items():
        encoded = name.encode()
        size, crc = (payload, 0) if data is None else (len(data), zlib.crc32(data))
        sizes = Struct("<QQ").pack(size, size)
        extra = _EXTRA.pack(_ZIP64_KIND, len(sizes)) + sizes
        padding = -(position + _HEADER.size + len(encoded) + len(extra) + _EXTRA.size) % ALIGNMENT
        extra += b"FB" + Struct("<H").pack(padding) + b"Z" * padding
        central = _EXTRA.pack(_ZIP64_KIND, 24) + sizes + Struct("<Q").pack(position)
        fields = _ZIP64_VERSION, 0, 0, crc, _UNKNOWN, _UNKNOWN, len(encoded)
        header = _HEADER.pack(_HEADER_MARK, *fields, len(extra)) + encoded + extra
        directory += _ENTRY.pack(
            _ENTRY_MARK, _ZIP64_VERSION, *fields, len(central), 0, 0, 0, _UNKNOWN
        )
        directory += encoded + central
        part += header
        if data is None:
            part = after
        else:
            part += data
        position += len(header) + size
    count, size, version = len(records), len(directory), _ZIP64_VERSION
    part += directory
    part += _END64.pack(
        _END64_MARK, _END64.size - 12, version, version, 0, 0, count, count, size, position
    )
    part += _END64_AT.pack(_END64_AT_MARK, 0, position + size, 1)
    part += _END.pack(_END_MARK, 0, 0, count, count, size, _UNKNOWN, 0)
    return bytes(before), bytes(after)


@dataclass(frozen=True)
class Record:
    """A stored record, by where its bytes are."""

    name: str
    offset: int
    """Byte of the file at which it begins."""
    size: int
    crc: int
    """CRC-32 from the directory; torch ignores it."""


@dataclass(frozen=True)
class Window:
    """The part of a file that is an archive."""

    file: BinaryIO
    offset: int
    length: int

    def read(self, at: int, size: int) -> bytes:
        """Return ``size`` bytes of the archive, from byte ``at`` on.

        Raises:
            ValueError: it doesn't have them.
        """
        if min(at, size) < 0 or at + size > self.length:
            raise ValueError(f"it has {self.length} bytes, not {size} from byte {at} on")
        self.file.seek(self.offset + at)
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError("it became shorter while it was read")
        return data

    def content(self, record: Record, limit: int) -> bytes:
        """Return the data of a small record.

        Raises:
            ValueError: it has more than ``limit`` bytes, or they are not those that were written.
        """
        if record.size > limit:
            raise ValueError(f"{record.name} has {record.size} bytes; at most {limit} are read")
        data = self.read(record.offset - self.offset, record.size)
        if zlib.crc32(data) != record.crc:
            raise ValueError(f"{record.name} is not what was written: its checksum differs")
        return data


def read_directory(window: Window) -> dict[str, Record]:
    """Return every record by its name, in lower case and without the folder: miniz looks it up so.

    Raises:
        ValueError: the archive is not a sound zip of stored records in one folder, or does not
            begin with a record.
        struct.error: the directory is cut off.
    """
    count, size, start = _extent(window)
    if size > MAX_DIRECTORY_BYTES:
        raise ValueError(f"a directory of {size} bytes; at most {MAX_DIRECTORY_BYTES} are read")
    directory = window.read(start, size)
    records: dict[str, Record] = {}
    extents: list[tuple[int, int]] = []
    root, position = "", 0
    for _ in range(count):
        name, header, record_size, crc, position = _entry(directory, position)
        folder, _, key = name.partition("/")
        if (records and folder != root) or key.lower() in records:
            raise ValueError(f"{key} is in it twice, or not in the folder of the others")
        at = _data_position(window, header, name)
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
    """Return the directory's number of records, its size and its position."""
    at = window.length - _END.size
    mark, *disks, _, count, size, start, _ = _END.unpack(window.read(at, _END.size))
    if mark != _END_MARK:
        raise ValueError("it has no directory at its end: it is cut off, or not a zip")
    if at >= _END64_AT.size:
        mark, _, end64, _ = _END64_AT.unpack(window.read(at - _END64_AT.size, _END64_AT.size))
        if mark == _END64_AT_MARK:
            at = end64
            fields = _END64.unpack(window.read(at, _END64.size))
            mark, _, _, _, *disks, _, count, size, start = fields
            if mark != _END64_MARK:
                raise ValueError("its directory is damaged")
    if start + size != at or any(disks):
        raise ValueError("its directory is not where it should be")
    return count, size, start


def _entry(directory: bytes, position: int) -> tuple[str, int, int, int, int]:
    """Return a record's name, header's position, size and CRC, and the next entry's position."""
    mark, _, _, flags, method, crc, packed, size, *lengths, disk, attributes, header = (
        _ENTRY.unpack_from(directory, position)
    )
    if mark != _ENTRY_MARK:
        raise ValueError("its directory is damaged")
    position += _ENTRY.size
    name, extra, comment = lengths
    text = directory[position : position + name].decode()
    numbers = _zip64(directory[position + name : position + name + extra])
    size, packed, header = (next(numbers) if n == _UNKNOWN else n for n in (size, packed, header))
    if method or flags & ~_FLAGS or packed != size:
        raise ValueError("the archive is compressed or encrypted")
    if disk or attributes & _IS_FOLDER or text.endswith("/"):
        raise ValueError(f"{text} is a folder, or in another archive")
    return text, header, size, crc, position + name + extra + comment


def _zip64(extra: bytes) -> Iterator[int]:
    """Yield the numbers of the zip64 extra field; raise ValueError when asked for one more."""
    position = 0
    while position + _EXTRA.size <= len(extra):
        kind, size = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if kind == _ZIP64_KIND:
            content = extra[position : position + size]
            yield from (n for (n,) in Struct("<Q").iter_unpack(content[: len(content) // 8 * 8]))
            break
        position += size
    raise ValueError("its directory lacks a number")


def _data_position(window: Window, header: int, name: str) -> int:
    """Return where a record's data begins in the archive."""
    fields: tuple[int, ...] = _HEADER.unpack(window.read(header, _HEADER.size))
    mark, _, _, method, *_, length, extra = fields
    text = window.read(header + _HEADER.size, length)
    if mark != _HEADER_MARK or method or text != name.encode():
        raise ValueError(f"the header of {name} is not what the directory says")
    return header + _HEADER.size + length + extra
