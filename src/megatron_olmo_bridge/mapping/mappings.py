"""Kinds of mapping between Hugging Face tensors and Megatron parameters."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from .placement import Placement, Region, Shape

WILDCARD = "*"
"""Stands for the layer's number in a name; a second one for the expert's. As in Megatron-Bridge."""


@dataclass(frozen=True, kw_only=True)
class Mapping(ABC):
    """How a Megatron parameter is made of Hugging Face tensors. Names may have wildcards."""

    megatron_param: str

    @property
    @abstractmethod
    def megatron_shape(self) -> Shape:
        """Shape of the whole Megatron parameter, before sharding."""

    @abstractmethod
    def hf_shapes(self) -> dict[str, Shape]:
        """Return name and shape of each Hugging Face tensor that the parameter is made of."""

    @abstractmethod
    def placements(self) -> Iterator[Placement]:
        """Yield the blocks of the parameter, in the order of its rows."""

    def chunks(self) -> list[Region]:
        """Return the blocks that megatron-core's ``sharded_state_dict`` stores separately."""
        return [Region.whole(self.megatron_shape)]

    def at(self, index: tuple[int, ...]) -> Self:
        """Return the mapping of one layer, or of one expert of a layer."""
        names = {n: numbered(v, index) for n, v in vars(self).items() if isinstance(v, str)}
        return replace(self, **names)


def numbered(pattern: str, index: tuple[int, ...]) -> str:
    """Return a name with its first wildcards replaced by these numbers."""
    for number in index:
        pattern = pattern.replace(WILDCARD, str(number), 1)
    return pattern


def split_numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the pattern and the numbers from which :func:`numbered` makes a name."""
    numbers = tuple(map(int, re.findall(r"\.(\d+)\.", name)))
    return re.sub(r"\.\d+\.", f".{WILDCARD}.", name), numbers


@dataclass(frozen=True, kw_only=True)
class DirectMapping(Mapping):
    """Equal tensors; ``padded_rows`` pads the parameter with rows of zeros (a vocabulary)."""

    hf_param: str
    hf_shape: Shape
    padded_rows: int | None = None

    @property
    def megatron_shape(self) -> Shape:
        return (self.padded_rows or self.hf_shape[0], *self.hf_shape[1:])

    def hf_shapes(self) -> dict[str, Shape]:
        return {self.hf_param: self.hf_shape}

    def placements(self) -> Iterator[Placement]:
        rows = Region.whole(self.hf_shape)
        yield Placement(self.hf_param, rows, self.megatron_param, rows)
        padding = Region.whole(self.megatron_shape)._replace(top=rows.bottom)
        if padding.rows:
            yield Placement(None, padding, self.megatron_param, padding)


@dataclass(frozen=True, kw_only=True)
class TransposedMapping(Mapping):
    """Matrix that Hugging Face stores as [in, out], which GPT-2's ``Conv1D`` does."""

    hf_param: str
    hf_shape: Shape

    @property
    def megatron_shape(self) -> Shape:
        return self.hf_shape[::-1]

    def hf_shapes(self) -> dict[str, Shape]:
        return {self.hf_param: self.hf_shape}

    def placements(self) -> Iterator[Placement]:
        hf = Region.whole(self.hf_shape)
        yield Placement(self.hf_param, hf, self.megatron_param, hf.transposed, transposed=True)


@dataclass(frozen=True, kw_only=True)
class QKVMapping(Mapping):
    """megatron-core's ``linear_qkv``: for each query group its q heads, its k head, its v head.

    ``q`` is [num_attention_heads * kv_channels, hidden_size]; ``k`` and ``v`` are
    [num_query_groups * kv_channels, hidden_size].
    """

    q: str
    k: str
    v: str
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    hidden_size: int

    @property
    def megatron_shape(self) -> Shape:
        heads = self.num_attention_heads + 2 * self.num_query_groups
        return (heads * self.kv_channels, self.hidden_size)

    def hf_shapes(self) -> dict[str, Shape]:
        kv = (self.num_query_groups * self.kv_channels, self.hidden_size)
        return {
            self.q: (self.num_attention_heads * self.kv_channels, self.hidden_size),
            self.k: kv,
            self.v: kv,
        }

    def placements(self) -> Iterator[Placement]:
        q_rows = self.num_attention_heads // self.num_query_groups * self.kv_channels
        row = 0
        for group in range(self.num_query_groups):
            for hf_name, rows in (
                (self.q, q_rows),
                (self.k, self.kv_channels),
                (self.v, self.kv_channels),
            ):
                hf_region = Region(group * rows, (group + 1) * rows, 0, self.hidden_size)
                megatron_region = Region(row, row + rows, 0, self.hidden_size)
                yield Placement(hf_name, hf_region, self.megatron_param, megatron_region)
                row += rows


@dataclass(frozen=True, kw_only=True)
class GatedMLPMapping(Mapping):
    """megatron-core's ``linear_fc1`` of a gated MLP: gate above up, each [ffn, hidden]."""

    gate: str
    up: str
    ffn_hidden_size: int
    hidden_size: int

    @property
    def megatron_shape(self) -> Shape:
        return (2 * self.ffn_hidden_size, self.hidden_size)

    def hf_shapes(self) -> dict[str, Shape]:
        return dict.fromkeys((self.gate, self.up), (self.ffn_hidden_size, self.hidden_size))

    def placements(self) -> Iterator[Placement]:
        hf_region = Region.whole((self.ffn_hidden_size, self.hidden_size))
        for hf_name, half in zip((self.gate, self.up), self.chunks(), strict=True):
            yield Placement(hf_name, hf_region, self.megatron_param, half)

    def chunks(self) -> list[Region]:
        gate = Region.whole((self.ffn_hidden_size, self.hidden_size))
        return [gate, gate._replace(top=gate.bottom, bottom=2 * gate.bottom)]


@dataclass(frozen=True, kw_only=True)
class FusedQKVMapping(Mapping):
    """``linear_qkv`` from GPT-2's tensor with all of q, all of k and all of v.

    The Hugging Face weight is [hidden_size, 3 * hidden_size], transposed. For the bias,
    [3 * hidden_size], ``hidden_size`` is None.
    """

    hf_param: str
    num_attention_heads: int
    kv_channels: int
    hidden_size: int | None

    @property
    def megatron_shape(self) -> Shape:
        rows = 3 * self.num_attention_heads * self.kv_channels
        return (rows,) if self.hidden_size is None else (rows, self.hidden_size)

    def hf_shapes(self) -> dict[str, Shape]:
        return {self.hf_param: self.megatron_shape[::-1]}

    def placements(self) -> Iterator[Placement]:
        width, columns = self.num_attention_heads * self.kv_channels, self.hidden_size or 1
        transposed = self.hidden_size is not None
        row = 0
        for head in range(self.num_attention_heads):
            for qkv in range(3):
                top = qkv * width + head * self.kv_channels
                hf_region = Region(top, top + self.kv_channels, 0, columns)
                megatron_region = hf_region._replace(top=row, bottom=row + self.kv_channels)
                if transposed:
                    hf_region = hf_region.transposed
                yield Placement(
                    self.hf_param, hf_region, self.megatron_param, megatron_region, transposed
                )
                row += self.kv_channels
