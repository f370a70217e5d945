"""Regions of tensors, and placements: "this block of that tensor stands here"."""

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

    Every tensor is seen as a matrix: a vector is one column, and dimensions past the first fold
    into the columns. That is all that row-major memory distinguishes.
    """

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """The region that covers a tensor of this shape."""
        return cls(0, shape[0] if shape else 1, 0, math.prod(shape[1:]))

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def size(self) -> int:
        """Elements in the region."""
        return self.rows * self.columns

    def intersect(self, other: Region) -> Region | None:
        """What both cover, or None."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Region(top, bottom, left, right) if top < bottom and left < right else None

    def contains(self, other: Region) -> bool:
        """Whether all of ``other``, which isn't empty, lies in this region."""
        return self.intersect(other) == other

    @property
    def transposed(self) -> Region:
        """The same block of the transposed tensor."""
        return Region(self.left, self.right, self.top, self.bottom)

    def moved(self, origin: Region, to: Region) -> Region:
        """This region, seen from ``to`` as it was seen from ``origin``."""
        down, across = to.top - origin.top, to.left - origin.left
        return Region(self.top + down, self.bottom + down, self.left + across, self.right + across)

    def __str__(self) -> str:
        return f"[{self.top}:{self.bottom}, {self.left}:{self.right}]"


@dataclass(frozen=True)
class Placement:
    """The block ``source`` of the Hugging Face tensor ``hf_name`` stands at ``target``.

    Both regions have the same extent; with ``transposed``, the rows of the one are the columns of
    the other. Where ``hf_name`` is None the target region is zeros (padding rows of a vocabulary)
    and ``source`` equals ``target``.
    """

    hf_name: str | None
    source: Region
    target: Region
    transposed: bool = False


def source_of(part: Region, target: Region, source: Region, transposed: bool) -> Region:
    """Where a part of ``target`` comes from, of which all comes from ``source``."""
    if transposed:
        return part.moved(target, source.transposed).transposed
    return part.moved(target, source)


def uncovered(shape: Sequence[int], regions: Iterable[Region]) -> str | None:
    """Why the regions don't cover a tensor of this shape exactly once; None if they do."""
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
    """A block that two of the regions cover, which are sorted and not empty.

    Goes down the rows. The regions that reach into a row are kept by their left ends: without an
    overlap so far they are disjoint there, and the next one can only meet its two neighbors.
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
