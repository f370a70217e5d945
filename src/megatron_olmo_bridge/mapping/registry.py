"""Registry of a family's mappings, and its resolution for a model of known size."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product

from megatron_olmo_bridge.errors import MappingError

from .mappings import WILDCARD, Mapping, numbered
from .placement import Placement, Region, Shape, uncovered

SHOWN_NAMES = 8
"""Maximum number of names that an error lists."""
SHOWN_OF_EACH_KIND = 5
"""The same for each list of an error with up to three lists."""
_MANY = 5000
"""Number of missing parameters up to which they are resolved, to report their names."""


@dataclass(frozen=True)
class Parameter:
    """Megatron parameter of a model of known size."""

    name: str
    """``decoder.layers.3.mlp.linear_fc2.weight``"""
    pattern: str
    """``decoder.layers.*.mlp.linear_fc2.weight``"""
    index: tuple[int, ...]
    """Layer, or layer and expert; empty for a parameter outside the layers."""
    shape: Shape
    placements: tuple[Placement, ...]
    chunks: tuple[Region, ...]

    def key(self, stacked_axes: int) -> str:
        """Return the checkpoint key if the last ``stacked_axes`` indices are axes of the tensor.

        ``decoder.layers.mlp.linear_fc2.weight`` for the layers' one index.
        """
        kept = numbered(self.pattern, self.index[: len(self.index) - stacked_axes])
        return kept.replace(f".{WILDCARD}", "")


@dataclass(frozen=True)
class ResolvedMapping:
    """Mapping of one model, in which all elements of both sides are covered exactly once."""

    counts: tuple[int, ...]
    """Number of layers and, if there are any, of experts."""
    parameters: dict[str, Parameter]
    hf_shapes: dict[str, Shape]
    """Hugging Face tensors in the order of the model's state dict."""
    ignored: dict[str, str]
    """Patterns of Hugging Face names that Megatron doesn't store, each with the reason."""

    @cached_property
    def placements_by_hf_name(self) -> dict[str, list[Placement]]:
        """Placements of all parameters, without padding."""
        by_hf_name: dict[str, list[Placement]] = defaultdict(list)
        for parameter in self.parameters.values():
            for placement in parameter.placements:
                if placement.hf_name is not None:
                    by_hf_name[placement.hf_name].append(placement)
        return dict(by_hf_name)

    def __post_init__(self) -> None:
        by_hf_name = self.placements_by_hf_name
        faults = [
            f"{name}: {why}"
            for name, p in self.parameters.items()
            if (why := uncovered(p.shape, (x.megatron_region for x in p.placements)))
        ]
        faults += [
            f"{name}: {why}"
            for name, shape in self.hf_shapes.items()
            if (why := uncovered(shape, (p.hf_region for p in by_hf_name.get(name, ()))))
        ]
        if faults:
            raise MappingError("the mapping does not cover the model:\n" + bulleted(faults))

    def reason_to_ignore(self, hf_name: str) -> str | None:
        """Return why the registry ignores a Hugging Face tensor; None if it does not."""
        return next((why for p, why in self.ignored.items() if fnmatchcase(hf_name, p)), None)

    def check_hf(self, shapes: MappingABC[str, Shape], where: object) -> None:
        """Raise MappingError unless these are the mapping's Hugging Face tensors.

        Args:
            shapes: shapes by name; ignored tensors may be among them.
            where: the checkpoint, for the message.
        """
        stored = {name: s for name, s in shapes.items() if self.reason_to_ignore(name) is None}
        check_tensors(self.hf_shapes, stored, where)


class MegatronMappingRegistry:
    """Mapping table of a family, with a row for each Megatron parameter of a layer or expert."""

    def __init__(
        self,
        *mappings: Mapping,
        num_layers: int,
        num_experts: int | None = None,
        ignored: dict[str, str] | None = None,
    ) -> None:
        self.mappings = mappings
        self.counts = (num_layers,) if num_experts is None else (num_layers, num_experts)
        self.ignored = ignored or {}

    def check_size(self, stored: int, where: object) -> None:
        """Raise MappingError if the model has far more parameters than a checkpoint has tensors.

        Call it before :meth:`resolve`, which takes time and memory for each layer and expert.

        Args:
            stored: number of tensors in the checkpoint, or of their chunks.
            where: the checkpoint, for the message.
        """
        patterns = (mapping.megatron_param for mapping in self.mappings)
        expected = sum(math.prod(self.counts[: name.count(WILDCARD)]) for name in patterns)
        if expected > stored + _MANY:
            counts = zip(self.counts, ("layers", "experts"), strict=False)
            size = " and ".join(f"{count:,} {name}" for count, name in counts)
            raise MappingError(
                f"{where}: has {stored:,} tensors, too few for a model of {size}: is it another "
                "model's config?"
            )

    def resolve(self) -> ResolvedMapping:
        """Return the mapping of every layer and expert.

        Raises:
            MappingError: an element of either side is covered twice or not at all, or two
                mappings have the same parameter.
        """
        parameters: dict[str, Parameter] = {}
        hf_shapes: dict[str, Shape] = {}
        for pattern, index, mapping in self._by_layer():
            name = mapping.megatron_param
            if name in parameters:
                raise MappingError(f"two mappings write the Megatron parameter {name}")
            placements, chunks = tuple(mapping.placements()), tuple(mapping.chunks())
            parameters[name] = Parameter(
                name, pattern, index, mapping.megatron_shape, placements, chunks
            )
            for hf_name, shape in mapping.hf_shapes().items():
                if hf_shapes.setdefault(hf_name, shape) != shape:
                    raise MappingError(f"two mappings give {hf_name} different shapes")
        return ResolvedMapping(self.counts, parameters, hf_shapes, self.ignored)

    def resolve_hf(self) -> dict[str, Shape]:
        """Return name and shape of every Hugging Face tensor, unchecked."""
        return {n: s for _, _, m in self._by_layer() for n, s in m.hf_shapes().items()}

    def _by_layer(self) -> Iterable[tuple[str, tuple[int, ...], Mapping]]:
        """Yield pattern, index and mapping of each parameter in the order of the state dict.

        Layers come one after the other at the place of the table's first layer row.
        """
        layered = [m for m in self.mappings if WILDCARD in m.megatron_param]
        first = self.mappings.index(layered[0]) if layered else len(self.mappings)
        for i, mapping in enumerate(self.mappings):
            if i == first:
                for layer in range(self.counts[0]):
                    for m in layered:
                        axes = m.megatron_param.count(WILDCARD)
                        for rest in product(*map(range, self.counts[1:axes])):
                            index = (layer, *rest)
                            yield m.megatron_param, index, m.at(index)
            if WILDCARD not in mapping.megatron_param:
                yield mapping.megatron_param, (), mapping


def check_tensors(
    expected: MappingABC[str, Shape], stored: MappingABC[str, Shape], where: object
) -> None:
    """Raise one MappingError that names all missing, unexpected and misshapen tensors."""
    missing = [n for n in expected if n not in stored]
    unexpected = [n for n in stored if n not in expected]
    misshapen = [
        f"{n} has shape {list(stored[n])}, the config asks for {list(expected[n])}"
        for n in expected
        if n in stored and stored[n] != expected[n]
    ]
    lists = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    faults = [
        f"{title} ({len(names)}):\n{bulleted(names, SHOWN_OF_EACH_KIND)}"
        for title, names in lists.items()
        if names
    ]
    if faults:
        message = f"{where}: its tensors are not those of its config."
        raise MappingError("\n".join([message, *faults]))


def bulleted(lines: list[str], most: int = SHOWN_NAMES) -> str:
    """Return the first ``most`` lines as a bulleted list, with the number of the others."""
    rest = len(lines) - most
    shown = [f"  - {line}" for line in lines[:most]]
    return "\n".join([*shown, f"  - and {rest} more"] if rest > 0 else shown)
