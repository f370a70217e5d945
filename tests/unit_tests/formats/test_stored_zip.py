"""Records of archives: found as torch finds them, or refused where two readers could disagree."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_olmo_bridge.formats.stored_zip import MAX_DIRECTORY_BYTES, Window, read_directory
from megatron_olmo_bridge.formats.torch_archive import object_archive, tensor_archive

DATA = b"0123456789"


def read(path: Path, data: bytes, before: bytes = b"") -> dict[str, tuple[int, int]]:
    """Offset and size of each record of an archive in the middle of a file."""
    path.write_bytes(before + data + b"behind it")
    with path.open("rb") as file:
        records = read_directory(Window(file, len(before), len(data)))
    return {name: (record.offset, record.size) for name, record in records.items()}


def zipped(*names: str, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip by the standard library, with the same bytes in each record."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name in names:
            archive.writestr(name, DATA)
    return out.getvalue()


def sound() -> bytes:
    return zipped("a/data.pkl", "a/data/0", "a/version")


def torchs() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.arange(3.0), "b": torch.zeros(100)}, out)
    return out.getvalue()


def ours() -> bytes:
    before, after = tensor_archive((4,), "float32")
    return before + bytes(16) + after


@pytest.mark.parametrize("make", [sound, torchs, ours, lambda: object_archive([1])])
@pytest.mark.parametrize("before", [b"", b"before it"])
def test_records_are_where_the_standard_library_finds_them(
    tmp_path: Path, make: Callable[[], bytes], before: bytes
) -> None:
    data = make()
    found = read(tmp_path / "a.pt", data, before)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {i.filename.partition("/")[2]: i.file_size for i in archive.infolist()}
    assert {name: size for name, (_, size) in found.items()} == names
    if make is sound:
        assert all((before + data)[at : at + size] == DATA for at, size in found.values())


def patched(data: bytes, old: bytes, new: bytes, nth: int = 0) -> bytes:
    """The bytes with one occurrence of ``old`` replaced; negative counts from the end."""
    pieces = data.split(old)
    assert len(pieces) > 1
    nth %= len(pieces) - 1
    return old.join(pieces[: nth + 1]) + new + old.join(pieces[nth + 1 :])


def with_directory(change: Callable[[bytearray, int], None]) -> bytes:
    """A sound zip whose directory is changed: given its bytes, and where its first entry begins."""
    data = bytearray(sound())
    change(data, data.index(b"PK\x01\x02"))
    return bytes(data)


def overlapping(data: bytearray, entry: int) -> None:
    """The first record reaches to the end of the second."""
    second = data.index(b"PK\x03\x04", 4)
    size = second + 30 + len("a/data/0") + len(DATA) - (30 + len("a/data.pkl"))
    struct.pack_into("<II", data, entry + 20, size, size)


def beyond(data: bytearray, entry: int) -> None:
    struct.pack_into("<II", data, entry + 20, 10_000, 10_000)


def encrypted(data: bytearray, entry: int) -> None:
    struct.pack_into("<H", data, entry + 8, 1)


def folder(data: bytearray, entry: int) -> None:
    data[entry + 38] = 0x10


def on_another_disk(data: bytearray, entry: int) -> None:
    data[entry + 34] = 1


def of_several_disks(data: bytearray, entry: int) -> None:
    data[data.index(b"PK\x05\x06") + 4] = 1


def header_of_the_second(data: bytearray, entry: int) -> None:
    struct.pack_into("<I", data, entry + 42, data.index(b"PK\x03\x04", 4))


def without_zip64(data: bytearray, entry: int) -> None:
    struct.pack_into("<II", data, entry + 20, 2**32 - 1, 2**32 - 1)


def fewer_records(data: bytearray, entry: int) -> None:
    end = data.index(b"PK\x05\x06")
    struct.pack_into("<HH", data, end + 8, 2, 2)


def more_records(data: bytearray, entry: int) -> None:
    end = data.index(b"PK\x05\x06")
    struct.pack_into("<HH", data, end + 8, 4, 4)


def larger_directory(data: bytearray, entry: int) -> None:
    end = data.index(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, MAX_DIRECTORY_BYTES + 1)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it has 0 bytes"),
    "not a zip": (lambda: b"x" * 100, "no directory at its end"),
    "cut off": (lambda: sound()[:-1], "no directory at its end"),
    "something before it": (lambda: b"x" + sound(), "its directory is not where it should be"),
    "no records": (zipped, "its directory is not that of its records"),
    "a name twice": (lambda: patched(zipped("a/x", "a/y"), b"a/y", b"a/x", -1), "x is in it twice"),
    "a name twice, with its header": (
        lambda: zipped("a/x", "a/y").replace(b"a/y", b"a/x"), "x is in it twice"),
    "a name twice, to readers that ignore case": (
        lambda: zipped("a/data.pkl", "a/DATA.pkl"), "DATA.pkl is in it twice"),
    "two folders": (lambda: zipped("a/x", "b/y"), "not in the folder of the others"),
    "another name in a header": (
        lambda: patched(sound(), b"a/data/0", b"a/data/1"), "the header of a/data/0"),
    "compressed": (
        lambda: zipped("a/x", compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "compressed by its header alone": (
        lambda: sound()[:8] + b"\x08" + sound()[9:], "the header of a/data.pkl"),
    "encrypted": (lambda: with_directory(encrypted), "compressed or encrypted"),
    "a folder": (lambda: with_directory(folder), "is a folder, or in another archive"),
    "a folder by its name": (lambda: zipped("a/x", "a/y/"), "is a folder, or in another archive"),
    "on another disk": (lambda: with_directory(on_another_disk), "or in another archive"),
    "of several disks": (lambda: with_directory(of_several_disks), "not where it should be"),
    "records that overlap": (lambda: with_directory(overlapping), "its records overlap"),
    "a record beyond the directory": (lambda: with_directory(beyond), "its records overlap"),
    "a header of another record": (lambda: with_directory(header_of_the_second), "the header of"),
    "a size in a field that is absent": (lambda: with_directory(without_zip64), "lacks a number"),
    "an entry that is not counted": (lambda: with_directory(fewer_records), "not that of its"),
    "an entry too few": (lambda: with_directory(more_records), "unpack_from requires"),
    "a large directory": (lambda: with_directory(larger_directory), "not where it should be"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path: Path, what: str) -> None:
    make, says = REFUSED[what]
    with pytest.raises((ValueError, struct.error), match=says):
        read(tmp_path / "a.pt", make())


def test_a_directory_larger_than_any_real_one_is_not_read(tmp_path: Path) -> None:
    """Refused for its size: a sparse file of zeros between the record and the end."""
    record = zipped("a/x")
    record = record[: record.index(b"PK\x01\x02")]
    file = tmp_path / "a.pt"
    with file.open("wb") as out:
        out.write(record)
        out.truncate(len(record) + MAX_DIRECTORY_BYTES + 1)
        out.seek(0, io.SEEK_END)
        out.write(
            struct.pack(
                "<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, MAX_DIRECTORY_BYTES + 1, len(record), 0
            )
        )
    with file.open("rb") as opened, pytest.raises(ValueError, match="a directory of 4194305 bytes"):
        read_directory(Window(opened, 0, file.stat().st_size))


def test_small_records_are_read_with_their_checksum(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    data = sound()
    file.write_bytes(data)
    with file.open("rb", buffering=0) as opened:
        window = Window(opened, 0, len(data))
        record = read_directory(window)["data.pkl"]
        assert window.content(record, 10) == DATA
        with pytest.raises(ValueError, match=r"data\.pkl has 10 bytes; at most 9 are read"):
            window.content(record, 9)
        file.write_bytes(patched(data, DATA, b"0123456788"))
        with pytest.raises(ValueError, match="its checksum differs"):
            window.content(record, 10)
