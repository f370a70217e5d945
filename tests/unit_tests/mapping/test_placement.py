"""Regions: blocks of tensors seen as matrices, and the rule that blocks cover a tensor once."""

import random

import pytest
import torch

from megatron_olmo_bridge.mapping.placement import Placement, Region, uncovered


def random_region(rng: random.Random, rows: int, columns: int) -> Region:
    top, bottom = sorted(rng.sample(range(rows + 1), 2))
    left, right = sorted(rng.sample(range(columns + 1), 2))
    return Region(top, bottom, left, right)


def mask(region: Region, rows: int, columns: int) -> torch.Tensor:
    out = torch.zeros(rows, columns, dtype=torch.bool)
    out[region.top : region.bottom, region.left : region.right] = True
    return out


def random_cuts(rng: random.Random, region: Region, depth: int) -> list[Region]:
    """The region cut into blocks, by rows or by columns, again and again."""
    if depth == 0 or region.size < 2:
        return [region]
    if region.rows > 1 and (region.columns == 1 or rng.random() < 0.5):
        at = rng.randrange(region.top + 1, region.bottom)
        halves = [region._replace(bottom=at), region._replace(top=at)]
    else:
        at = rng.randrange(region.left + 1, region.right)
        halves = [region._replace(right=at), region._replace(left=at)]
    return [part for half in halves for part in random_cuts(rng, half, depth - 1)]


@pytest.mark.parametrize(
    ("shape", "region"),
    [
        ((), Region(0, 1, 0, 1)),
        ((5,), Region(0, 5, 0, 1)),
        ((5, 3), Region(0, 5, 0, 3)),
        ((5, 3, 2), Region(0, 5, 0, 6)),
        ((0, 3), Region(0, 0, 0, 3)),
    ],
)
def test_whole_folds_every_shape_into_a_matrix(shape: tuple[int, ...], region: Region) -> None:
    assert Region.whole(shape) == region
    assert Region.whole(shape).size == torch.empty(shape).numel()


def test_intersection_is_that_of_the_elements() -> None:
    rng = random.Random(0)
    empty = 0
    for _ in range(300):
        a, b = random_region(rng, 6, 5), random_region(rng, 6, 5)
        common = mask(a, 6, 5) & mask(b, 6, 5)
        found = a.intersect(b)
        if found is None:
            assert not common.any()
            empty += 1
        else:
            assert torch.equal(mask(found, 6, 5), common)
        assert a.intersect(b) == b.intersect(a)
        assert a.contains(b) == bool((mask(a, 6, 5) | ~mask(b, 6, 5)).all())
    assert 30 < empty < 270  # both cases were tried


def test_moved_keeps_extent_and_place_relative_to_the_origin() -> None:
    rng = random.Random(1)
    for _ in range(100):
        region, origin, to = (random_region(rng, 9, 9) for _ in range(3))
        there = region.moved(origin, to)
        assert (there.rows, there.columns) == (region.rows, region.columns)
        assert (there.top - to.top, there.left - to.left) == (
            region.top - origin.top,
            region.left - origin.left,
        )
        assert there.moved(to, origin) == region


def test_the_hf_region_of_a_part_of_a_placement_has_the_same_elements() -> None:
    rng = random.Random(2)
    hf = torch.arange(12 * 12).view(12, 12)
    for transposed in (False, True):
        for _ in range(50):
            hf_region, part = random_region(rng, 12, 12), None
            block = hf[hf_region.top : hf_region.bottom, hf_region.left : hf_region.right]
            block = block.T if transposed else block
            megatron_region = Region(3, 3 + block.shape[0], 5, 5 + block.shape[1])
            megatron = torch.full((20, 20), -1)
            megatron[3 : megatron_region.bottom, 5 : megatron_region.right] = block
            while part is None:
                part = random_region(rng, 20, 20).intersect(megatron_region)
            found = Placement("h", hf_region, "m", megatron_region, transposed).hf_region_of(part)
            elements = hf[found.top : found.bottom, found.left : found.right]
            expected = megatron[part.top : part.bottom, part.left : part.right]
            assert torch.equal(elements.T if transposed else elements, expected)


def test_a_region_reads_as_a_slice() -> None:
    assert str(Region(1, 4, 0, 7)) == "[1:4, 0:7]"


@pytest.mark.parametrize("seed", range(20))
def test_cuts_of_a_tensor_cover_it(seed: int) -> None:
    rng = random.Random(seed)
    shape = (rng.randrange(1, 30), rng.randrange(1, 30))
    cuts = random_cuts(rng, Region.whole(shape), 4)
    rng.shuffle(cuts)
    assert uncovered(shape, cuts) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_missing_a_duplicate_and_a_larger_block_are_found(seed: int) -> None:
    rng = random.Random(seed)
    shape = (rng.randrange(5, 30), rng.randrange(5, 30))
    cuts = random_cuts(rng, Region.whole(shape), 3)
    rng.shuffle(cuts)
    victim = cuts[0]
    total = shape[0] * shape[1]
    assert uncovered(shape, cuts[1:]) == f"{victim.size} of {total} elements are not covered"
    assert uncovered(shape, [*cuts, victim]) == f"block {victim} is covered twice"
    beyond = victim._replace(bottom=shape[0] + 1)
    assert uncovered(shape, [beyond]) == (f"block {beyond} lies outside the shape {list(shape)}")


@pytest.mark.parametrize("seed", range(200))
def test_overlapping_blocks_are_found_wherever_they_are(seed: int) -> None:
    rng = random.Random(seed)
    rows, columns = rng.randrange(2, 9), rng.randrange(2, 9)
    blocks = [random_region(rng, rows, columns) for _ in range(rng.randrange(2, 5))]
    times_covered = sum(mask(block, rows, columns).int() for block in blocks)
    said = uncovered((rows, columns), blocks)
    assert (said is not None and "is covered twice" in said) == bool((times_covered > 1).any())


def test_many_blocks_in_the_same_rows_are_checked_quickly() -> None:
    """Compared in pairs they would take minutes."""
    many = 20_000
    blocks = [Region(i % 7, 100, i, i + 1) for i in range(many)]
    covered = sum(block.size for block in blocks)
    assert uncovered((100, many), blocks) == (
        f"{100 * many - covered} of {100 * many} elements are not covered"
    )


def test_blocks_with_the_right_number_of_elements_may_still_overlap() -> None:
    # 4 elements for a tensor of 4: one of them twice, one not at all.
    blocks = [Region(0, 1, 0, 2), Region(0, 1, 1, 2), Region(1, 2, 0, 1)]
    assert uncovered((2, 2), blocks) == "block [0:1, 1:2] is covered twice"


def test_nothing_covers_a_tensor_without_elements() -> None:
    assert uncovered((0, 4), []) is None
    assert uncovered((2,), []) == "2 of 2 elements are not covered"
