"""Runs of a tensor in its source, and the whole blocks that a copy of it can share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_olmo_bridge.formats.tensors import Piece, StoredArray, TensorView
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.storage.runs import BLOCK, runs_of, shared_residue, whole_blocks

KIB = 1 << 10


def stored(offset: int, rows: int, columns: int = 2048) -> StoredArray:
    """A bfloat16 array, of a block for each row."""
    return StoredArray(Path("s"), offset, (rows, columns), "bfloat16")


def test_whole_rows_are_one_run_and_parts_of_rows_are_many() -> None:
    view = TensorView.of_array("t", stored(72, 3))
    assert list(runs_of(view.pieces[0], view)) == [(72, 0, 3 * BLOCK)]
    left = Region(0, 3, 0, 1024)
    half = TensorView.assembled("h", (3, 1024), [Piece(stored(72, 3), left, left)])
    assert list(runs_of(half.pieces[0], half)) == [
        (72, 0, 2048), (72 + BLOCK, 2048, 2048), (72 + 2 * BLOCK, 4096, 2048),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source_at", "target_at", "count", "expected"),
    [
        (0, BLOCK, 64 * KIB, (0, 64 * KIB)),
        (72, 72, 64 * KIB, (BLOCK - 72, 64 * KIB - BLOCK)),
        (72, 72 + 7 * BLOCK, 64 * KIB + 100, (BLOCK - 72, 64 * KIB - BLOCK)),
        (72, 80, 64 * KIB, (0, 0)),  # at another place in the block
        (0, 0, 64 * KIB - 1, (0, 0)),  # short
    ],
)
def test_blocks_are_shared_where_both_files_have_them_whole(
    source_at: int, target_at: int, count: int, expected: tuple[int, int]
) -> None:
    assert whole_blocks(source_at, target_at, count) == expected


def test_most_of_the_bytes_decide_where_a_tensor_is_written() -> None:
    """As of q, k and v in one tensor, of which q is the largest."""
    parts = [(stored(8, 64), 0), (stored(16, 16), 64), (stored(24, 16), 80)]
    pieces = [
        Piece(array, Region.whole(array.shape), Region(top, top + array.shape[0], 0, 2048))
        for array, top in parts
    ]
    assert shared_residue(TensorView.assembled("qkv", (96, 2048), pieces), "bfloat16") == 8


def test_what_is_converted_or_short_shares_nothing() -> None:
    view = TensorView.of_array("t", stored(8, 64))
    assert shared_residue(view, "bfloat16") == 8
    assert shared_residue(view, "float32") is None
    assert shared_residue(TensorView.of_array("norm", stored(8, 1)), "bfloat16") is None
    assert shared_residue(None, "") is None
