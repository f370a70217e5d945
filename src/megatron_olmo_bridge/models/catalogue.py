"""What is supported: families, architectures, sizes, heads, and what each was verified with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .families import bridges

VERIFIED = "transformers 5.23; megatron-core 0.16.1, 0.19.2"


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    family: str
    architectures: list[str]
    """Values of ``architectures`` in ``config.json``, one for each head."""
    sizes: dict[str, int]
    """Published sizes, and a tiny one for tests, by name: their parameters."""
    layouts: str
    """Parallel layouts that the logits and gradients were compared at."""
    verified: str
    """Versions that they were compared with."""


def catalogue() -> list[Family]:
    """Every family that is supported."""
    return [
        Family(
            bridge.family,
            [name for name in bridge.architectures if name[0].isupper()],
            {
                name: sum(math.prod(s) for s in bridge(c).mapping_registry().resolve_hf().values())
                for name, c in bridge.sizes.items()
            },
            bridge.layouts,
            VERIFIED,
        )
        for bridge in bridges()
    ]


def markdown() -> str:
    """The table as README.md has it."""
    rows = [["family", "architectures", "sizes", "compared at"], ["---"] * 4]
    for family in catalogue():
        names = ", ".join(f"`{name}`" for name in family.architectures)
        sizes = ", ".join(f"{name} ({human_count(n)})" for name, n in family.sizes.items())
        rows.append([family.family, names, sizes, family.layouts])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def human_count(count: int) -> str:
    """``7.30B``"""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
