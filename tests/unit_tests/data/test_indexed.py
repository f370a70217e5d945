"""Megatron's indexed datasets, against megatron-core's own reader and writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_olmo_bridge.data.indexed import read_indexed, write_index
from megatron_olmo_bridge.data.prefix import is_indexed, prefix_of
from megatron_olmo_bridge.errors import FormatError, InputError

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[7, 8, 9, 10]]]
"""Documents, of sequences, of tokens."""


def build(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> str:
    """Write a dataset by megatron-core."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = torch.tensor([t for s in sequences for t in s])
        builder.add_document(tokens, [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_what_megatron_wrote_is_read(tmp_path: Path, dtype: type, suffix: str) -> None:
    prefix = build(tmp_path / "da.ta", DOCUMENTS, dtype)
    found = read_indexed(prefix + suffix)
    assert (found.prefix, found.dtype, found.documents, found.tokens) == (prefix, dtype, 3, 10)
    assert found.lengths.tolist() == [3, 1, 2, 4]
    assert found.document_lengths().tolist() == [3, 3, 4]
    assert found.first_tokens(5).tolist() == [1, 2, 3, 4, 5]
    assert found.first_tokens(50).tolist() == list(range(1, 11))


@pytest.mark.parametrize("lengths", [[3, 1, 4], [1], []])
def test_an_index_is_written_as_megatron_writes_it(tmp_path: Path, lengths: list[int]) -> None:
    prefix = build(tmp_path / "stock", [[[1] * n] for n in lengths], np.int32)
    write_index(tmp_path / "own.idx", np.array(lengths, np.int32), np.dtype("int32"))
    assert (tmp_path / "own.idx").read_bytes() == Path(f"{prefix}.idx").read_bytes()


def test_a_written_index_is_read_by_megatron(tmp_path: Path) -> None:
    np.arange(9, dtype="uint16").tofile(tmp_path / "own.bin")
    write_index(tmp_path / "own.idx", np.array([4, 5], np.int32), np.dtype("uint16"))
    stock = IndexedDataset(str(tmp_path / "own"))  # its arrays die with it
    assert [s.tolist() for s in stock[:]] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_a_missing_file(tmp_path: Path) -> None:
    prefix = build(tmp_path / "data", DOCUMENTS)
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(InputError, match=r"data\.bin: no such file"):
        read_indexed(prefix)


@pytest.mark.parametrize("left", [0, 5, 33, 40, -1])
def test_a_cut_index(tmp_path: Path, left: int) -> None:
    index = Path(build(tmp_path / "data", DOCUMENTS) + ".idx")
    index.write_bytes(index.read_bytes()[:left])
    with pytest.raises(FormatError, match=r"data\.idx: (cut short|not the index)"):
        read_indexed(index)


@pytest.mark.parametrize(
    ("size", "why"), [(0, "cut short"), (19, "cut short"), (21, "not the data")]
)
def test_a_bin_of_another_size(tmp_path: Path, size: int, why: str) -> None:
    prefix = build(tmp_path / "data", DOCUMENTS)
    Path(f"{prefix}.bin").write_bytes(bytes(size))
    with pytest.raises(FormatError, match=rf"data\.bin: {why}.*data\.idx promises 20"):
        read_indexed(prefix)


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [(0, b"X", "not the index"), (9, b"\x02", "version 2"), (17, b"\x07", "dtype code 7"),
     (17, b"\x63", "dtype code 99"), (-1, b"\x7f", "damaged"), (82, b"\xff", "damaged"),
     (37, b"\xff", "damaged"), (50, b"\x02", "do not follow each other"),
     (74, b"\x0e", "do not follow each other"), (34, b"\x02", "do not follow each other")],
)  # fmt: skip
def test_a_damaged_index(tmp_path: Path, at: int, value: bytes, why: str) -> None:
    index = Path(build(tmp_path / "data", DOCUMENTS) + ".idx")
    data = bytearray(index.read_bytes())
    data[at : at + 1 or None] = value
    index.write_bytes(data)
    with pytest.raises(FormatError, match=why):
        read_indexed(index)


def test_prefixes(tmp_path: Path) -> None:
    assert (
        prefix_of("a/b.v1") == prefix_of("a/b.v1.bin") == prefix_of(Path("a/b.v1.idx")) == "a/b.v1"
    )
    assert not is_indexed(tmp_path / "data")
    prefix = build(tmp_path / "data", DOCUMENTS)
    assert all(is_indexed(prefix + suffix) for suffix in ("", ".bin", ".idx"))
