"""Describe tensors on disk: arrays in files, and views assembled from regions of arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.mapping.placement import Region, Shape, uncovered

from .remote_path import AnyPath

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element of the dtypes that weights are converted in, by torch's names."""


class _Sized:
    """Sizes that follow from ``shape`` and ``dtype``."""

    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    @cached_property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @cached_property
    def row_bytes(self) -> int:
        return self.columns * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class StoredArray(_Sized):
    """A contiguous row-major array in a file."""

    file: AnyPath
    offset: int
    """Byte at which the array begins."""
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Piece:
    """A region of a tensor and the region of a stored array that has its elements."""

    array: StoredArray | None
    """None for a region of zeros; then ``array_region`` repeats ``tensor_region``."""
    array_region: Region
    tensor_region: Region
    transposed: bool = False
    """Whether the rows of one region are the columns of the other."""

    @classmethod
    def zeros(cls, region: Region) -> Piece:
        """Return a piece of zeros, which no array stores."""
        return cls(None, region, region)


@dataclass(frozen=True)
class TensorSpec(_Sized):
    """Name, shape and dtype of a tensor, wherever its elements come from."""

    name: str
    shape: Shape
    dtype: str

    @property
    def stored(self) -> tuple[TensorView, ...]:
        """Views whose bytes are read for the tensor; none if its elements are in memory."""
        return ()


@dataclass(frozen=True)
class TensorView(TensorSpec):
    """A tensor made of pieces, which cover it exactly once."""

    pieces: tuple[Piece, ...]

    @property
    def stored(self) -> tuple[TensorView, ...]:
        return (self,)

    @classmethod
    def of_array(cls, name: str, array: StoredArray) -> TensorView:
        """Return a view of one whole array."""
        whole = Region.whole(array.shape)
        return cls(name, array.shape, array.dtype, (Piece(array, whole, whole),))

    @classmethod
    def assembled(
        cls, name: str, shape: Shape, pieces: Iterable[Piece], dtype: str = ""
    ) -> TensorView:
        """Return a view of these pieces; ``dtype`` is needed only if all are zeros.

        Raises:
            FormatError: they don't cover the shape exactly once, or have more than one dtype.
        """
        pieces = tuple(sorted(pieces, key=lambda p: p.tensor_region))
        if why := uncovered(shape, (p.tensor_region for p in pieces)):
            raise FormatError(f"{name}: {why}")
        dtypes = {p.array.dtype for p in pieces if p.array} or {dtype}
        if len(dtypes) != 1:
            raise FormatError(f"{name}: its parts have different dtypes: {sorted(dtypes)}")
        return cls(name, shape, dtypes.pop(), pieces)

    def pieces_of(self, region: Region, at: Region, transposed: bool = False) -> Iterator[Piece]:
        """Yield the pieces of ``region``, moved to the region ``at`` of another tensor.

        Args:
            region: the region of this tensor.
            at: its place in the other tensor.
            transposed: whether the rows of ``region`` are the columns of ``at``.
        """
        for piece in self.pieces:
            if part := piece.tensor_region.intersect(region):
                yield Piece(
                    piece.array,
                    part.moved(piece.tensor_region, piece.array_region, piece.transposed),
                    part.moved(region, at, transposed),
                    piece.transposed != transposed,
                )

    def region(self, region: Region, shape: Shape) -> TensorView:
        """Return one region as a tensor of its own, of the given shape."""
        return replace(self, shape=shape, pieces=tuple(self.pieces_of(region, Region.whole(shape))))


@dataclass(frozen=True)
class MixedView(TensorView):
    """A tensor whose pieces are stored in several dtypes; each is cast to ``dtype`` when read."""

    @property
    def parts(self) -> tuple[TensorView, ...]:
        """One view for each stored dtype, with the pieces of that dtype in their places."""
        by_dtype: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            if piece.array:
                by_dtype.setdefault(piece.array.dtype, []).append(piece)
        pieces = sorted(by_dtype.items())
        return tuple(TensorView(self.name, self.shape, dtype, tuple(p)) for dtype, p in pieces)


@dataclass(frozen=True)
class MeanView(TensorSpec):
    """A weighted mean of tensors of one shape, computed when it is read."""

    terms: tuple[tuple[float, TensorView], ...]
    """Weight and tensor of each term; the weights may have any sum."""

    @classmethod
    def of(cls, terms: Iterable[tuple[float, TensorView]], dtype: str) -> MeanView:
        """Return the mean, rounded to ``dtype``, under the name of the first tensor."""
        terms = tuple(terms)
        first = terms[0][1]
        return cls(first.name, first.shape, dtype, terms)

    @property
    def stored(self) -> tuple[TensorView, ...]:
        return tuple(view for _, view in self.terms)


Readable = TensorView | MeanView
"""A tensor whose elements can be read."""
