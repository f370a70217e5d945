"""Archives: ``torch.load`` reads ours, and we find the elements in those of ``torch.save``."""

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.errors import FormatError, UnsafePickleError
from megatron_olmo_bridge.formats.inert import Inert, built, inert
from megatron_olmo_bridge.formats.pickles import Persistent, dumps
from megatron_olmo_bridge.formats.stored_zip import ALIGNMENT
from megatron_olmo_bridge.formats.tensors import StoredArray
from megatron_olmo_bridge.formats.torch_archive import (
    StoredStorage,
    array_of,
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


class Tensor(torch.Tensor):
    """A tensor of the program that trained."""


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.partition_dim = 1  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.randn(4, 3).t(), "the tensor is not contiguous"),
        (torch.randn(4, 6)[:, :3], "the tensor is not contiguous"),
        (torch.arange(3), "tensors of torch.LongStorage are not converted"),
        (torch.randn(3).double(), "tensors of torch.DoubleStorage are not converted"),
        ([None], "holds <list>, not a plain tensor"),
        ({"a": torch.zeros(2)}, "holds <dict>, not a plain tensor"),
        (
            torch._neg_view(torch.randn(4, 4)),
            "negates or conjugates its elements, .*: {'neg': True}",
        ),
        (torch.nn.Parameter(torch._neg_view(torch.randn(4))), "negates or conjugates"),
        (torch.randn(3, dtype=torch.complex64).conj(), "negates or conjugates .*: {'conj': True}"),
        (with_attribute(torch.nn.Parameter(torch.zeros(2))), "_rebuild_parameter_with_state, not"),
        (with_attribute(torch.zeros(2)), "asks for torch._tensor._rebuild_from_type_v2,"),
        (torch.zeros(2).as_subclass(Tensor), "asks for torch._tensor._rebuild_from_type_v2,"),
        (torch.zeros(2).to_sparse(), "_rebuild_sparse_tensor, not a plain tensor"),
        (torch.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage, not a plain tensor"),
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


REBUILD = inert("torch._utils._rebuild_tensor_v2")


def stored(count: int = 64, kind: str = "FloatStorage", key: Any = "0") -> Persistent:
    return Persistent(("storage", inert(f"torch.{kind}"), key, "cpu", count))


def rebuilt(*args: Any, shape: Any = (64,), strides: Any = (1,), storage: Any = None) -> Inert:
    """A tensor as ``torch.save`` pickles it, with these arguments after the hooks."""
    hooks = inert("collections.OrderedDict")()
    return REBUILD(stored() if storage is None else storage, 0, shape, strides, False, hooks, *args)


def changed(tensor: Inert, **attributes: Any) -> Inert:
    """A tensor that the pickle goes on to change."""
    tensor.state = attributes
    return tensor


def test_a_tensor_with_empty_metadata_is_plain(tmp_path: Path) -> None:
    for args in ((), (None,), ({},)):
        array = tensor_of(rezipped(tmp_path, {"data.pkl": dumps(rebuilt(*args))}))
        assert (array.shape, array.dtype) == ((64,), "float32")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (rebuilt({"neg": True}), "negates or conjugates"),
        (rebuilt({"neg": False}), "other metadata"),
        (rebuilt(["neg"]), "other metadata"),
        (rebuilt({}, 1), "other metadata"),
        (changed(rebuilt(), a=1), "holds torch._utils._rebuild_tensor_v2, not a plain tensor"),
        (inert("torch._utils._rebuild_parameter")(changed(rebuilt(), a=1), True), "not a plain"),
        (changed(inert("torch._utils._rebuild_parameter")(rebuilt(), True)), "not a plain tensor"),
        (rebuilt(shape=(2**63,)), "which is not a tensor"),
        (rebuilt(shape=(1,) * 65, strides=(1,) * 65), "don't fit"),
        (rebuilt(shape=(10**500,)), "which is not a tensor"),
        (rebuilt(storage=stored(key="1")),  "has no record 'data/1'"),
        (rebuilt(storage=stored(key=0)), "is not a storage"),
        (rebuilt(storage=stored(count=10**500)), "256 bytes cannot hold an integer of 1661 bits"),
        (rebuilt(storage=Persistent(("module", "x"))), r"\('module', 'x'\) is not a storage"),
        ([rebuilt(), rebuilt(storage=stored(64, "IntStorage"))], "'0' has two dtypes or sizes"),
        ([rebuilt(storage=stored(9, "IntStorage")), rebuilt(storage=stored(8, "IntStorage"))],
         "'0' has two dtypes or sizes"),
    ],
)  # fmt: skip
def test_a_tensor_that_torch_reads_otherwise_is_refused(
    tmp_path: Path, value: Any, says: str
) -> None:
    file = rezipped(tmp_path, {"data.pkl": dumps(value)})
    with pytest.raises(FormatError, match=says) as caught:
        tensor_of(file)
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < 500


def test_tensors_may_share_a_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    first, second = read_archive(saved(tmp_path, [base, base[1:]]))
    assert first.args[0] == second.args[0]
    array = array_of(second, tmp_path / "saved.pt", "second")
    assert torch.equal(values(array), base[1:])


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    """``torch.load`` hands a file with this record to ``torch.jit.load``."""
    file = rezipped(tmp_path, {})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("saved/constants.pkl", b"x")
    with pytest.raises(FormatError, match="is a TorchScript program"):
        tensor_of(file)


def test_a_flipped_bit_in_the_pickle_is_noticed(tmp_path: Path) -> None:
    file = saved(tmp_path, torch.zeros(64))
    data = bytearray(file.read_bytes())
    data[data.index(b"_rebuild_tensor_v2")] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"data\.pkl is not what was written: its checksum"):
        tensor_of(file)


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
