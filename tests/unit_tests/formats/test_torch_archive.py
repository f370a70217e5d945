"""Archives: ``torch.load`` reads ours, and we find the elements in those of ``torch.save``."""

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.errors import FormatError, UnsafePickleError
from megatron_olmo_bridge.formats.pickles import built
from megatron_olmo_bridge.formats.tensors import StoredArray
from megatron_olmo_bridge.formats.torch_archive import (
    ALIGNMENT,
    StoredStorage,
    object_archive,
    read_archive,
    read_tensor,
    tensor_archive,
)

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES: list[tuple[int, ...]] = [(7,), (3, 5), (2, 3, 4), (1, 6), (4, 1), ()]


def payload(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def values(array: StoredArray) -> torch.Tensor:
    data = array.file.read_bytes()[array.offset : array.offset + array.nbytes]
    flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, array.dtype))
    return flat.view(array.shape)


def saved(tmp_path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, tmp_path / "saved.pt", **options)
    return tmp_path / "saved.pt"


def tensor_of(file: Path) -> StoredArray:
    return read_tensor(file, 0, file.stat().st_size)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_a_written_tensor(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], mmap: bool
) -> None:
    tensor = torch.randn(shape).to(getattr(torch, dtype))
    before, after = tensor_archive(shape, dtype)
    assert len(before) % ALIGNMENT == 0
    file = tmp_path / "t.pt"
    file.write_bytes(before + payload(tensor) + after)
    loaded = torch.load(file, weights_only=True, mmap=mmap)
    assert loaded.dtype == tensor.dtype
    assert loaded.is_contiguous()
    assert torch.equal(loaded, tensor)
    assert torch.equal(values(tensor_of(file)), tensor)


def test_an_archive_is_a_sound_zip(tmp_path: Path) -> None:
    before, after = tensor_archive((2, 2), "float32")
    whole = io.BytesIO(before + bytes(16) + after)
    with zipfile.ZipFile(whole) as archive:
        names = ["data.pkl", "byteorder", "data/0", "version"]
        assert archive.namelist() == [f"archive/{n}" for n in names]
        assert archive.testzip() in (None, "archive/data/0")  # the payload has no CRC
        assert archive.read("archive/version") == b"3\n"


def test_the_same_tensor_gives_the_same_archive() -> None:
    assert tensor_archive((2, 3), "float16") == tensor_archive((2, 3), "float16")
    assert tensor_archive((2, 3), "float16") != tensor_archive((3, 2), "float16")


@pytest.mark.parametrize(
    "value", [[None], {"a": 1, "b": [2.5, "x", (True, None)]}, 2**100, -(2**40), {}, []]
)
def test_torch_loads_a_written_object(value: Any) -> None:
    assert torch.load(io.BytesIO(object_archive(value)), weights_only=True) == value


def test_torch_loads_a_written_namespace() -> None:
    import argparse

    archive = object_archive({"args": built("argparse.Namespace", {"num_layers": 3})})
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(io.BytesIO(archive), weights_only=True)
    assert loaded == {"args": argparse.Namespace(num_layers=3)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_finds_the_elements_of_a_saved_tensor(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape).to(getattr(torch, dtype))
    array = tensor_of(saved(tmp_path, tensor))
    assert (array.dtype, array.shape) == (dtype, shape)
    assert torch.equal(values(array), tensor)


def test_finds_the_elements_of_a_view_with_an_offset(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    array = tensor_of(saved(tmp_path, base[2:5]))
    assert array.shape == (3, 4)
    assert torch.equal(values(array), base[2:5])


def test_finds_the_elements_of_a_parameter(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    array = tensor_of(saved(tmp_path, parameter))
    assert torch.equal(values(array), parameter.data)


def test_finds_a_tensor_in_the_middle_of_a_file(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    archive = io.BytesIO()
    torch.save(tensor, archive)
    data = archive.getvalue()
    file = tmp_path / "m.distcp"
    file.write_bytes(b"x" * 13 + data + b"y" * 50)
    assert torch.equal(values(read_tensor(file, 13, len(data))), tensor)


def test_a_column_of_extent_one_may_have_any_stride(tmp_path: Path) -> None:
    tensor = torch.randn(5).as_strided((5, 1), (1, 7))
    assert torch.equal(values(tensor_of(saved(tmp_path, tensor))), tensor)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.randn(4, 3).t(), "the tensor is not contiguous"),
        (torch.randn(4, 6)[:, :3], "the tensor is not contiguous"),
        (torch.arange(3), "tensors of torch.LongStorage are not converted"),
        (torch.randn(3).double(), "tensors of torch.DoubleStorage are not converted"),
        ([None], "not a plain tensor"),
        ({"a": torch.zeros(2)}, "not a plain tensor"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        tensor_of(saved(tmp_path, value))


def test_values_beside_tensors_are_plain(tmp_path: Path) -> None:
    value = {"iteration": 7, "t": torch.zeros(2, 3), "o": OrderedDict(a=1)}
    read = read_archive(saved(tmp_path, value))
    assert (read["iteration"], read["o"]) == (7, {"a": 1})
    storage = read["t"].args[0]
    assert isinstance(storage, StoredStorage)
    assert (storage.dtype, storage.count) == ("float32", 6)


def test_code_in_an_archive_is_refused(tmp_path: Path) -> None:
    import os

    with pytest.raises(UnsafePickleError, match=r"posix\.system"):
        read_archive(saved(tmp_path, {"x": os.system}))


def rezipped(
    tmp_path: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED
) -> Path:
    """A saved tensor of 64 zeros with records replaced, or removed for None."""
    source, target = saved(tmp_path, torch.zeros(64)), tmp_path / "rezipped.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            record = name.partition("/")[2]
            data = changes.get(record, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"byteorder": b"big"}, "big-endian tensors can't be read"),
        ({"data.pkl": None}, "the archive has no data.pkl"),
        ({"data/0": None}, "data/0"),
        ({"data/0": bytes(60)}, "60 bytes cannot hold 64 x float32"),
        ({"data.pkl": b"garbage"}, "not a readable pickle"),
    ],
)
def test_a_foreign_archive_is_refused(
    tmp_path: Path, changes: dict[str, bytes | None], says: str
) -> None:
    file = rezipped(tmp_path, changes)
    with pytest.raises(FormatError, match=says) as caught:
        tensor_of(file)
    assert str(caught.value).startswith(str(file))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the archive is compressed"):
        tensor_of(rezipped(tmp_path, {}, zipfile.ZIP_DEFLATED))


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(saved(tmp_path, torch.zeros(64))) as archive:
        pickled = archive.read("saved/data.pkl")
    shape, longer = b"K\x40\x85", b"K\x41\x85"  # (64,) and (65,)
    assert pickled.count(shape) == 1
    file = rezipped(tmp_path, {"data.pkl": pickled.replace(shape, longer)})
    with pytest.raises(FormatError, match="the tensor is larger than its storage"):
        tensor_of(file)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, torch.zeros(64))
    size = file.stat().st_size
    with pytest.raises(FormatError, match=f"truncated: {size} bytes, needs {size + 1}"):
        read_tensor(file, 0, size + 1)
    with pytest.raises(FormatError, match=r"not an archive of torch\.save"):
        read_tensor(file, 0, size - 10)
    with pytest.raises(FormatError, match="at byte 5: not an archive"):
        read_tensor(file, 5, 100)
