"""Order of the tensors in Hugging Face files, so that most of them can be cloned."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_olmo_bridge.checkpoints.hf_files import shards
from megatron_olmo_bridge.formats.tensors import StoredArray, TensorView
from megatron_olmo_bridge.storage.runs import BLOCK

LIMIT = 100 * BLOCK


def tensors(*stored: tuple[str, int, int]) -> dict[str, TensorView]:
    """Tensors of bfloat16 by name, offset in the source, and rows of a block each."""
    return {
        name: TensorView.of_array(name, StoredArray(Path("s"), offset, (rows, 2048), "bfloat16"))
        for name, offset, rows in stored
    }


def laid_out(stored: dict[str, TensorView], limit: int = LIMIT) -> list[list[tuple[str, int]]]:
    """Name and place within a block of each tensor, by file."""
    return [
        [(p.view.name, p.offset % BLOCK) for p in file.payloads]
        for file in shards(stored, "keep", limit)
    ]


def test_the_header_is_padded_to_the_place_of_most_bytes() -> None:
    stored = tensors(("norm", 8, 1), ("a", 72, 16), ("b", 72, 16), ("other", 80, 16))
    assert laid_out(stored, 10 * LIMIT) == [[("a", 72), ("b", 72), ("norm", 72), ("other", 72)]]


def test_half_a_block_between_makes_room_for_the_tensors_half_a_block_further() -> None:
    half = BLOCK // 2
    stored = tensors(("a", 8, 16), ("b", 8 + half, 16), ("c", 8, 16))
    norm = StoredArray(Path("s"), 0, (half // 2,), "bfloat16")
    stored["norm"] = TensorView.of_array("norm", norm)
    assert laid_out(stored) == [[("a", 8), ("c", 8), ("norm", 8), ("b", 8 + half)]]


def test_large_parts_from_different_files_are_in_different_files() -> None:
    stored = tensors(("a", 8, 30), ("norm", 0, 1), ("b", 16, 60), ("c", 8, 30))
    assert laid_out(stored) == [[("a", 8), ("c", 8), ("norm", 8)], [("b", 16)]]
    stored = tensors(("a", 8, 30), ("b", 16, 16), ("c", 8, 30))  # too small for a file
    assert laid_out(stored) == [[("a", 8), ("c", 8), ("b", 8)]]


def test_a_place_that_no_header_has_is_left_alone() -> None:
    stored = tensors(("a", 3, 16))
    ((only,),) = laid_out(stored)
    assert only[0] == "a" and only[1] % 8 == 0


@pytest.mark.parametrize("limit", [LIMIT, 20 * BLOCK])
def test_every_tensor_is_written_once_without_gaps(limit: int) -> None:
    stored = tensors(*[(f"t{i}", 8 * (i % 3), 16 if i % 4 else 1) for i in range(12)])
    files = shards(stored, "keep", limit)
    assert sorted(p.view.name for file in files for p in file.payloads) == sorted(stored)
    for file in files:
        ends = [part.offset + part.nbytes for part in file.parts]
        assert [part.offset for part in file.parts] == [0, *ends[:-1]]
        assert file.size == ends[-1]
        assert sum(p.nbytes for p in file.payloads) <= limit
