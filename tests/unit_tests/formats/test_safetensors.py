"""Headers of safetensors files, read from the library's files and written for the library."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_olmo_bridge.errors import FormatError, UnsupportedError
from megatron_olmo_bridge.formats.files import JSON_LIMIT
from megatron_olmo_bridge.formats.safetensors import read_header, write_header
from megatron_olmo_bridge.formats.tensors import StoredArray

TENSORS = {
    "vector": torch.randn(7),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(2, 3, 4).bfloat16(),
    "scalar": torch.randn(()),
    "empty": torch.empty(0, 4),
}


def values(array: StoredArray) -> torch.Tensor:
    data = array.file.read_bytes()[array.offset : array.offset + array.nbytes]
    flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, array.dtype))
    return flat.view(array.shape)


def raw(tmp_path: Path, header: Any, payload: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "raw.safetensors"
    file.write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + bytes(payload)
    )
    return file


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file, {"format": "pt"})
    arrays = read_header(file)
    assert arrays.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].dtype == str(tensor.dtype).removeprefix("torch.")
        if tensor.numel():
            assert torch.equal(values(arrays[name]), tensor)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    described = {
        n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in TENSORS.items()
    }
    payload = b"".join(
        t.flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""
        for t in (t.reshape(-1) for t in TENSORS.values())
    )
    file = tmp_path / "b.safetensors"
    file.write_bytes(write_header(described) + payload)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(opened.get_tensor(name), tensor)
            assert opened.get_tensor(name).dtype == tensor.dtype
    assert {n: (a.dtype, a.shape) for n, a in read_header(file).items()} == described


def test_the_payload_is_aligned() -> None:
    for width in range(1, 20):
        assert len(write_header({"n" * width: ("float16", (3,))})) % 8 == 0


def test_names_with_any_characters(tmp_path: Path) -> None:
    name = 'a "quoted" näme'
    file = tmp_path / "c.safetensors"
    file.write_bytes(write_header({name: ("float32", (1,))}) + bytes(4))
    with safe_open(file, "pt") as opened:
        assert list(opened.keys()) == [name]
    assert list(read_header(file)) == [name]


@pytest.mark.parametrize(
    ("header", "payload", "says"),
    [
        ({"t": entry(0, 8)}, 7, "truncated"),
        ({"t": entry(0, 8)}, 9, "has 1 bytes after its last tensor"),
        ({"t": entry(4, 8)}, 8, "tensor t at bytes 4 to 8 leaves a gap before it"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b at bytes 4 to 12 overlaps"),
        ({"t": entry(0, 8, [3])}, 8, "tensor t: 8 bytes .* can't hold shape \\[3\\] of float32"),
        ({"t": entry(0, 8, dtype="F33")}, 8, "tensor t has the unknown dtype 'F33'"),
        ({"t": entry(0, 8, dtype=["F32"])}, 8, "tensor t has the unknown dtype"),
        ({"t": entry(0, 8, {"2": 2})}, 8, "tensor t: the header's entry is not sound"),
        ({"t": entry(0, 8, "2")}, 8, "tensor t: the header's entry is not sound"),
        ({"t": entry(0, 8, ["2"])}, 8, "tensor t: its shape or offsets are not whole numbers"),
        ({"t": entry(0, 8, [2.0])}, 8, "tensor t: its shape or offsets are not whole numbers"),
        ({"t": entry(0, 8, [-2])}, 8, "tensor t: its shape or offsets are not whole numbers"),
        ({"t": entry(0, 4, [True])}, 4, "tensor t: its shape or offsets are not whole numbers"),
        ({"t": entry(0, 8, [2**63, 0])}, 8, "tensor t: its shape or offsets are not whole"),
        ({"t": entry(0, 2**64)}, 8, "tensor t: its shape or offsets are not whole"),
        ({"t": entry(0, 8, [2**63 - 1] * 8)}, 8, "tensor t: 8 bytes .* can't hold shape"),
        ({"t": entry(0, 8, [1] * 9)}, 8, "tensor t has 9 dimensions"),
        ({"t": entry(0, 8, [9 ** 900] * 3000)}, 8, "tensor t has 3,000 dimensions"),
        (b'{"t":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,0]}}', 0,
         "a number of more than 1,000 digits"),
        ({"": entry(0, 8)}, 8, "'' is not the name of a tensor"),
        ({"a\x1b[2J": entry(0, 8)}, 8, r"'a\\x1b\[2J' is not the name of a tensor"),
        ({"t" * 501: entry(0, 8)}, 8, "'t+'\\.\\.\\. is not the name of a tensor"),
        ({"\ud800": entry(0, 8)}, 8, "half a surrogate pair"),
        ({"t": {"dtype": "F32", "shape": [2]}}, 8, "tensor t: the header's entry is not sound"),
        ({"t": 3}, 8, "tensor t: the header's entry is not sound"),
        ({"t": entry(0, 8) | {"data_offsets": [0]}}, 8, "tensor t: the header's entry"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__ is not an object of strings"),
        ({"__metadata__": []}, 0, "__metadata__ is not an object of strings"),
        ([1], 0, "not sound JSON: it is not an object"),
        (b"{", 0, "not sound JSON"),
        (b"\xff\xfe", 0, "not sound JSON"),
        (b'{"t":1,"t":2}', 0, "'t' stands in it twice"),
        (b"[" * 100_000, 0, "not sound JSON"),
    ],
)  # fmt: skip
def test_an_unsound_header_is_refused(tmp_path: Path, header: Any, payload: int, says: str) -> None:
    file = raw(tmp_path, header, payload)
    with pytest.raises(FormatError, match=says) as caught:
        read_header(file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "U32"])
def test_quantized_tensors_are_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"tensor t is {dtype}: quantized"):
        read_header(raw(tmp_path, {"t": entry(0, 8, dtype=dtype)}, 8))


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F64"])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"tensor t is {dtype}; weights are"):
        read_header(raw(tmp_path, {"t": entry(0, 8, dtype=dtype)}, 8))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("BOOL", [8]), ("U8", [2, 4]), ("I64", [1]), ("F8_E4M3", [8]), ("F4", [16]), ("C64", [1])],
)
def test_what_is_no_weight_may_have_any_dtype(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    header = {"mask": entry(0, 8, shape, dtype), "weight": entry(8, 16)}
    arrays = read_header(raw(tmp_path, header, 16), is_buffer=lambda name: name == "mask")
    assert {n: a.dtype for n, a in arrays.items()} == {"weight": "float32"}
    header["mask"]["shape"] = [7, *shape]
    with pytest.raises(FormatError, match=r"tensor mask: 8 bytes .* can't hold shape"):
        read_header(raw(tmp_path, header, 16), is_buffer=lambda name: name == "mask")


@pytest.mark.parametrize(
    "write",
    [
        lambda tmp: raw(tmp, b"{}", length=3),
        lambda tmp: raw(tmp, b"{}", length=JSON_LIMIT + 1),
        lambda tmp: raw(tmp, b"{}", length=2**64 - 1),
    ],
)
def test_a_header_longer_than_the_file_is_refused(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    with pytest.raises(FormatError, match="truncated or not a safetensors file"):
        read_header(write(tmp_path))


def test_a_header_above_the_limit_is_refused_by_its_length(tmp_path: Path) -> None:
    file = raw(tmp_path, b"{}", length=JSON_LIMIT + 1)
    with file.open("r+b") as handle:
        handle.truncate(JSON_LIMIT + 9)  # sparse
    with pytest.raises(FormatError, match="its header has 25,165,825 bytes; headers are read up"):
        read_header(file)


def test_a_header_of_many_tensors(tmp_path: Path) -> None:
    header = {f"model.layers.{i}.weight": entry(4 * i, 4 * i + 4) for i in range(150_000)}
    file = raw(tmp_path, header)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size + 4 * 150_000)
    arrays = read_header(file)
    assert list(arrays) == list(header)
    assert arrays["model.layers.149999.weight"].offset == file.stat().st_size - 4


def test_a_file_too_short_for_a_length(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"1234567")
    with pytest.raises(FormatError, match="truncated: 7 bytes are too few"):
        read_header(tmp_path / "s")
