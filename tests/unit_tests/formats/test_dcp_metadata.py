"""``.metadata``: what torch wrote is read, what is written torch reads; no byte has two owners."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron_olmo_bridge.errors import FormatError, UnsupportedError
from megatron_olmo_bridge.formats.dcp_metadata import (
    METADATA,
    Chunk,
    GlobalTensor,
    StoredBytes,
    encode_metadata,
    read_metadata,
)
from megatron_olmo_bridge.formats.pickles import dumps, loads


def test_torch_reads_the_metadata_that_is_written(tmp_path: Path) -> None:
    chunks = (
        Chunk((0, 0, 0), (1, 2, 3), StoredBytes("__0_0.distcp", 0, 900)),
        Chunk((1, 0, 0), (1, 2, 3), StoredBytes("__0_1.distcp", 2**40, 900)),
    )
    whole = (Chunk((0,), (5,), StoredBytes("__0_0.distcp", 960, 800)),)
    tensors = {
        "layers.w": GlobalTensor("bfloat16", (2, 2, 3), chunks),
        "norm": GlobalTensor("float32", (5,), whole),
    }
    objects = {"layers._extra_state/shard_0_2": StoredBytes("__0_0.distcp", 1800, 64)}
    (tmp_path / ".metadata").write_bytes(encode_metadata(tensors, objects))

    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    described = metadata.state_dict_metadata
    assert described.keys() == tensors.keys() | objects.keys()
    layers, norm = described["layers.w"], described["norm"]
    assert isinstance(layers, TensorStorageMetadata)
    assert isinstance(norm, TensorStorageMetadata)
    assert (layers.properties.dtype, norm.properties.dtype) == (torch.bfloat16, torch.float32)
    assert layers.properties.layout is torch.strided
    assert layers.properties.memory_format is torch.contiguous_format
    assert layers.size == torch.Size([2, 2, 3])
    assert [tuple(c.offsets) for c in layers.chunks] == [(0, 0, 0), (1, 0, 0)]
    assert {tuple(c.sizes) for c in layers.chunks} == {(1, 2, 3)}
    assert isinstance(described["layers._extra_state/shard_0_2"], BytesStorageMetadata)
    stored = {
        (index.fqn, index.offset and tuple(index.offset)): (
            info.relative_path,
            info.offset,
            info.length,
        )
        for index, info in metadata.storage_data.items()
    }
    assert stored == {
        ("layers.w", (0, 0, 0)): ("__0_0.distcp", 0, 900),
        ("layers.w", (1, 0, 0)): ("__0_1.distcp", 2**40, 900),
        ("norm", (0,)): ("__0_0.distcp", 960, 800),
        ("layers._extra_state/shard_0_2", None): ("__0_0.distcp", 1800, 64),
    }
    assert read_metadata(tmp_path) == (tensors, objects)


def test_a_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    chunk = Chunk((0,), (5,), StoredBytes("../x.distcp", 0, 800))
    tensors = {"w": GlobalTensor("float32", (5,), (chunk,))}
    (tmp_path / ".metadata").write_bytes(encode_metadata(tensors, {}))
    with pytest.raises(FormatError, match=r"w would be in '\.\./x\.distcp', outside the folder"):
        read_metadata(tmp_path)


def test_a_chunk_or_object_without_a_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    chunk = Chunk((0,), (5,), StoredBytes("x.distcp", 0, 800))
    path.write_bytes(
        encode_metadata(
            {"w": GlobalTensor("float32", (5,), (chunk,))}, {"o": StoredBytes("x.distcp", 0, 8)}
        )
    )
    real = pickle.loads(path.read_bytes())
    for key, says in (("w", "where w at \\[0\\] is stored"), ("o", "where o is stored")):
        kept = {i: info for i, info in real.storage_data.items() if i.fqn != key}
        path.write_bytes(pickle.dumps(type(real)(real.state_dict_metadata, None, kept)))
        with pytest.raises(FormatError, match=f"does not say {says}"):
            read_metadata(tmp_path)


# ------------------------------------------------------------------------- chunks and their places

FILE = "__0_0.distcp"
UPPER = Chunk((0, 0), (2, 3), StoredBytes(FILE, 0, 100))
LOWER = Chunk((2, 0), (2, 3), StoredBytes(FILE, 100, 100))
OBJECT = StoredBytes(FILE, 200, 50)


def written(
    path: Path, *chunks: Chunk, shape: tuple[int, ...] = (4, 3), stored: StoredBytes = OBJECT
) -> Path:
    """A checkpoint's folder with a tensor ``w`` of these chunks, and an object."""
    tensors = {"w": GlobalTensor("bfloat16", shape, chunks)}
    (path / METADATA).write_bytes(encode_metadata(tensors, {"o": stored}))
    return path


def test_chunks_that_lie_beside_each_other(tmp_path: Path) -> None:
    tensors, objects = read_metadata(written(tmp_path, UPPER, LOWER))
    assert tensors["w"].chunks == (UPPER, LOWER)
    assert objects == {"o": OBJECT}


@pytest.mark.parametrize(
    "stored",
    [
        LOWER.stored,
        StoredBytes(FILE, 150, 100),
        StoredBytes(FILE, 120, 10),
        StoredBytes(FILE, 0, 1000),
    ],
    ids=["the same", "overlapping", "within", "around"],
)
@pytest.mark.parametrize("of", ["a chunk", "an object"])
def test_stored_bytes_belong_to_one_chunk_or_object(
    tmp_path: Path, stored: StoredBytes, of: str
) -> None:
    if of == "an object":
        written(tmp_path, UPPER, LOWER, stored=stored)
    else:
        upper = replace(UPPER, stored=stored)
        written(tmp_path, upper, LOWER, stored=StoredBytes("__0_1.distcp", 0, 1))
    with pytest.raises(FormatError, match=rf"{FILE}: \w and \w would share bytes \d+ to \d+ of it"):
        read_metadata(tmp_path)


def test_the_same_bytes_of_two_files_are_not_shared(tmp_path: Path) -> None:
    lower = replace(LOWER, stored=replace(UPPER.stored, file="__0_1.distcp"))
    tensors, _ = read_metadata(written(tmp_path, UPPER, lower))
    assert tensors["w"].chunks == (UPPER, lower)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path, UPPER, LOWER)
    (tmp_path / FILE).write_bytes(bytes(250))
    assert read_metadata(tmp_path)[1] == {"o": OBJECT}
    (tmp_path / FILE).write_bytes(bytes(249))
    with pytest.raises(FormatError, match="truncated: o ends at byte 250, the file has 249"):
        read_metadata(tmp_path)


HUGE = 10**500


@pytest.mark.parametrize(
    ("chunk", "shape", "says"),
    [
        (replace(UPPER, shape=(5, 3)), (4, 3),
         r"w: its chunk \(5, 3\) at \(0, 0\) reaches beyond its shape \(4, 3\)"),
        (replace(UPPER, shape=(-2, 3)), (4, 3), "-2 is not a size"),
        (replace(UPPER, offset=(0, -1)), (4, 3), "-1 is not a size"),
        (replace(UPPER, offset=(0, HUGE)), (4, 3), "an integer of 1661 bits is not a size"),
        (replace(UPPER, shape=(2, True)), (4, 3), "True is not a size"),
        (replace(UPPER, shape=(2,)), (4, 3), "w: its chunks have other dimensions than its shape"),
        (replace(UPPER, shape=(1,) * 65), (4, 3), r"\(1, 1, .*\.\.\.\) is not a shape"),
        (UPPER, (HUGE, 3), "an integer of 1661 bits is not a size"),
        (UPPER, (2**62, 3), r"w: no tensor has the shape \(4611686018427387904, 3\)"),
        (UPPER, (1,) * 65, r"\(1, 1, .*\.\.\.\) is not a shape"),
        (replace(UPPER, stored=StoredBytes(FILE, -1, 5)), (4, 3), "-1 is not a size"),
        (replace(UPPER, stored=StoredBytes(FILE, 0, 2**63)), (4, 3), "9223372036854775808 is not"),
    ],
)  # fmt: skip
def test_numbers_that_no_tensor_has(
    tmp_path: Path, chunk: Chunk, shape: tuple[int, ...], says: str
) -> None:
    written(tmp_path, chunk, LOWER, shape=shape)
    with pytest.raises(FormatError, match=says) as caught:
        read_metadata(tmp_path)
    assert len(str(caught.value)) < 500


# ------------------------------------------------------------------ values that have no place in it


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A sound ``.metadata`` whose attributes are changed."""
    file = written(path, UPPER, LOWER) / METADATA
    metadata = loads(file.read_bytes(), file)
    change(metadata.state)
    file.write_bytes(dumps(metadata))
    return path


def place(state: dict[str, Any]) -> dict[str, Any]:
    """Where the first chunk is stored."""
    return next(iter(state["storage_data"].values())).state  # type: ignore[no-any-return]


def index(state: dict[str, Any]) -> dict[str, Any]:
    """Which chunk is the first one."""
    return next(iter(state["storage_data"])).state  # type: ignore[no-any-return]


def tensor(state: dict[str, Any]) -> dict[str, Any]:
    return state["state_dict_metadata"]["w"].state  # type: ignore[no-any-return]


def test_the_metadata_that_the_next_test_changes_is_sound(tmp_path: Path) -> None:
    assert read_metadata(edited(tmp_path, lambda state: None))[0]["w"].chunks == (UPPER, LOWER)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: place(s).update(relative_path="../x"), r"w would be in '\.\./x', outside"),
        (lambda s: place(s).update(relative_path="."), r"w would be in '\.', outside the folder"),
        (lambda s: place(s).update(relative_path=""), "w would be in '', outside the folder"),
        (lambda s: place(s).update(relative_path="a\0"), r"w would be in 'a\\x00', outside"),
        (lambda s: place(s).update(relative_path="x" * 256), r"w would be in 'x+'\.\.\., outside"),
        (lambda s: place(s).update(relative_path=3), "w would be in 3, outside the folder"),
        (lambda s: place(s).pop("offset"), r"KeyError \('offset',\)"),
        (lambda s: place(s).update(offset=[]), r"\[\] is not a size"),
        (lambda s: index(s).update(fqn=[1]), r"\[1\] is not the name of a tensor"),
        (lambda s: index(s).update(fqn="a\nb"), r"'a\\nb' is not the name of a tensor"),
        (lambda s: index(s).update(fqn="x" * 1001), r"'x+'\.\.\. is not the name of a tensor"),
        (lambda s: index(s).update(offset=7), "7 is not a shape"),
        (lambda s: tensor(s).update(size=None), "None is not a shape"),
        (lambda s: tensor(s).update(size="ab"), "'ab' is not a shape"),
        (lambda s: tensor(s).update(chunks=None), "TypeError"),
        (lambda s: tensor(s).update(chunks=[3]), "3 is not a ChunkStorageMetadata"),
        (lambda s: tensor(s).update(properties=3), "AttributeError"),
        (lambda s: s.update(storage_data=[1]), "AttributeError"),
        (lambda s: s.update(storage_data={"a": "b"}), "'a' is not a MetadataIndex"),
        (lambda s: s.update(state_dict_metadata={3: None}), "3 is not the name of a tensor"),
        (lambda s: s.update(state_dict_metadata={"w": 3}), "AttributeError"),
    ],
)
def test_values_that_have_no_place_in_it(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        read_metadata(edited(tmp_path, change))
    assert str(caught.value).startswith(f"{tmp_path / METADATA}: ")
    assert len(str(caught.value)) < 500


def test_files_that_an_extension_compressed_are_refused(tmp_path: Path) -> None:
    edited(tmp_path, lambda state: place(state).update(transform_descriptors=["stream.zstd"]))
    with pytest.raises(UnsupportedError, match="w is stored compressed or encrypted"):
        read_metadata(tmp_path)
