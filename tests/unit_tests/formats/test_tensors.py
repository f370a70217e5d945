"""Views: tensors put together from blocks of arrays in files."""

from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.tensors import Piece, StoredArray, TensorSpec, TensorView
from megatron_olmo_bridge.mapping.placement import Region

ARRAY = StoredArray(Path("f"), 100, (4, 6), "bfloat16")


def piece(region: Region, dtype: str = "bfloat16") -> Piece:
    array = StoredArray(Path("f"), 0, (region.rows, region.columns), dtype)
    return Piece(array, Region.whole(array.shape), region)


def test_sizes() -> None:
    view = TensorView.of_array("t", ARRAY)
    assert (ARRAY.nbytes, view.nbytes, view.row_bytes) == (48, 48, 12)
    assert TensorSpec("s", (), "float32").nbytes == 4


def test_pieces_are_put_in_order() -> None:
    halves = [piece(Region(2, 4, 0, 6)), piece(Region(0, 2, 0, 6))]
    view = TensorView.assembled("t", (4, 6), halves)
    assert [p.tensor_region.top for p in view.pieces] == [0, 2]
    assert (view.shape, view.dtype) == ((4, 6), "bfloat16")


@pytest.mark.parametrize(
    ("regions", "says"),
    [
        ([Region(0, 2, 0, 6)], "t: 12 of 24 elements are not covered"),
        ([Region(0, 3, 0, 6), Region(2, 4, 0, 6)], r"t: block \[2:3, 0:6\] is covered twice"),
        ([Region(0, 5, 0, 6)], "t: block .* lies outside the shape"),
    ],
)
def test_pieces_that_do_not_cover_the_tensor_are_refused(regions: list[Region], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        TensorView.assembled("t", (4, 6), map(piece, regions))


def test_mixed_dtypes_are_refused() -> None:
    halves = [piece(Region(0, 2, 0, 6)), piece(Region(2, 4, 0, 6), "float32")]
    with pytest.raises(FormatError, match=r"different dtypes: \['bfloat16', 'float32'\]"):
        TensorView.assembled("t", (4, 6), halves)


def test_a_region_of_a_view_is_a_view_of_the_same_bytes() -> None:
    view = TensorView.of_array("t", ARRAY).region(Region(1, 3, 2, 5), (2, 3))
    assert view.shape == (2, 3)
    assert view.pieces == (Piece(ARRAY, Region(1, 3, 2, 5), Region(0, 2, 0, 3)),)


def test_within_moves_source_and_target_alike() -> None:
    stored = piece(Region(2, 4, 1, 6))
    zeros = Piece.zeros(Region(0, 2, 0, 6))
    left = piece(Region(2, 4, 0, 1))
    view = TensorView.assembled("t", (4, 6), [zeros, left, stored])
    found = list(view.pieces_of(Region(1, 3, 1, 6), Region(10, 12, 20, 25)))
    assert found == [
        Piece(None, Region(1, 2, 1, 6), Region(10, 11, 20, 25)),
        Piece(stored.array, Region(0, 1, 0, 5), Region(11, 12, 20, 25)),
    ]
