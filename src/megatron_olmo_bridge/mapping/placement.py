"""Regions of tensors, and placements, which say which regions of two tensors are equal."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

Shape = tuple[int, ...]


class Region(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of a tensor, ends excluded.

    Every tensor is a matrix in row-major order: a vector is one column, and dimensions after the
    first are folded into the columns.
    """

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return the region that covers a tensor of this shape."""
        return cls(0, shape[0] if shape else 1, 0, math.prod(shape[1:]))

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    def intersect(self, other: Region) -> Region | None:
        """Return the region that both cover, or None."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Region(top, bottom, left, right) if top < bottom and left < right else None

    def contains(self, other: Region) -> bool:
        """Return whether ``other``, which must not be empty, lies entirely in this region."""
        return self.intersect(other) == other

    @property
    def transposed(self) -> Region:
        """The same region of the transposed tensor."""
        return Region(self.left, self.right, self.top, self.bottom)

    def moved(self, origin: Region, to: Region, transposed: bool = False) -> Region:
        """Return the region that lies in ``to`` as this one lies in ``origin``.

        Args:
            origin: a region that contains this one.
            to: a region with the same rows and columns as ``origin``.
            transposed: the rows of ``origin`` are the columns of ``to`` instead.
        """
        if transposed:
            return self.moved(origin, to.transposed).transposed
        down, across = to.top - origin.top, to.left - origin.left
        return Region(self.top + down, self.bottom + down, self.left + across, self.right + across)

    def __str__(self) -> str:
        return f"[{self.top}:{self.bottom}, {self.left}:{self.right}]"


@dataclass(frozen=True)
class Placement:
    """Two regions with equal elements: one of a Hugging Face tensor, one of a Megatron parameter.

    Both have the same rows and columns, unless the placement is ``transposed``.
    """

    hf_name: str | None
    """None for zero padding of a vocabulary; then ``hf_region`` repeats ``megatron_region``."""
    hf_region: Region
    megatron_name: str
    megatron_region: Region
    transposed: bool = False
    """The rows of one region are the columns of the other."""

    def hf_region_of(self, part: Region) -> Region:
        """Return where a part of ``megatron_region`` is in the Hugging Face tensor."""
        return part.moved(self.megatron_region, self.hf_region, self.transposed)


def uncovered(shape: Sequence[int], regions: Iterable[Region]) -> str | None:
    """Return why the regions don't cover a tensor of this shape exactly once; None if they do."""
    whole = Region.whole(shape)
    ordered = sorted(regions)
    for region in ordered:
        if not whole.contains(region):
            return f"block {region} lies outside the shape {list(shape)}"
    if overlap := _overlap(ordered):
        return f"block {overlap} is covered twice"
    covered = sum(region.size for region in ordered)
    if covered != whole.size:
        return f"{whole.size - covered} of {whole.size} elements are not covered"
    return None


def _overlap(ordered: Iterable[Region]) -> Region | None:
    """Return a region that two of the sorted, non-empty regions cover, or None.

    Sweep over the rows from the top. The regions that reach into the current row are disjoint
    unless an overlap was found before, so a new one can only overlap its two neighbors by column.
    """
    lefts: list[int] = []
    by_left: dict[int, Region] = {}
    bottoms: list[tuple[int, int]] = []
    for region in ordered:
        while bottoms and bottoms[0][0] <= region.top:
            del lefts[bisect_left(lefts, heappop(bottoms)[1])]
        at = bisect_left(lefts, region.left)
        for left in lefts[max(0, at - 1) : at + 1]:
            if overlap := region.intersect(by_left[left]):
                return overlap
        lefts.insert(at, region.left)
        by_left[region.left] = region
        heappush(bottoms, (region.bottom, region.left))
    return None
