"""Prefix of an indexed dataset: its path without .bin and .idx. Needs no numpy."""

from __future__ import annotations

from pathlib import Path


def prefix_of(path: str | Path) -> str:
    """Return the prefix of a dataset, given the prefix or one of its two files."""
    return str(path).removesuffix(".bin").removesuffix(".idx")


def is_indexed(path: str | Path) -> bool:
    """Return whether a path is the prefix or a file of an indexed dataset."""
    return str(path).endswith((".bin", ".idx")) or Path(f"{path}.idx").is_file()
