"""The name of an indexed dataset: what stands before .bin and .idx. Needs no numpy."""

from __future__ import annotations

from pathlib import Path


def prefix_of(path: str | Path) -> str:
    """The prefix of a dataset that is named by it, or by one of its two files."""
    return str(path).removesuffix(".bin").removesuffix(".idx")


def is_indexed(path: str | Path) -> bool:
    """Whether a path names an indexed dataset: its prefix, or one of its files."""
    return str(path).endswith((".bin", ".idx")) or Path(f"{path}.idx").is_file()
