"""Catalogue of supported families, architectures and sizes, and what each was verified with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .families import bridges

VERIFIED = "transformers 5.23; megatron-core 0.16.1, 0.19.2"


@dataclass(frozen=True)
class Family:
    """Row of the catalogue."""

    family: str
    architectures: list[str]
    """Values of ``architectures`` in ``config.json``, one for each head."""
    sizes: dict[str, int]
    """Number of parameters of each published size, and of a tiny one for tests, by name."""
    layouts: str
    """Parallel layouts at which logits and gradients were compared with transformers."""
    verified: str
    """Library versions used in the comparison."""


def catalogue() -> list[Family]:
    """Return every supported family."""
    return [
        Family(
            bridge.family,
            [name for name in bridge.architectures if name[0].isupper()],
            {
                name: sum(map(math.prod, bridge(config).hf_shapes.values()))
                for name, config in bridge.sizes.items()
            },
            bridge.layouts,
            VERIFIED,
        )
        for bridge in bridges()
    ]


def markdown() -> str:
    """Return the catalogue as the Markdown table in README.md."""
    rows = [["family", "architectures", "sizes", "compared at"], ["---"] * 4]
    for family in catalogue():
        names = ", ".join(f"`{name}`" for name in family.architectures)
        sizes = ", ".join(f"{name} ({human_count(n)})" for name, n in family.sizes.items())
        rows.append([family.family, names, sizes, family.layouts])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def human_count(count: int) -> str:
    """Return a count of parameters as text, for example ``7.30B``."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
