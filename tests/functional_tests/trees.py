"""Whole folders as values: to compare two of them, or one before and after."""

import hashlib
from pathlib import Path


def tree_hash(path: Path) -> dict[str, str]:
    """Mode and content of everything in a folder, by name: equal for equal trees."""
    return {p.relative_to(path).as_posix(): _described(p) for p in sorted(path.rglob("*"))}


def contents(path: Path) -> dict[str, bytes]:
    """Content of every file in a folder, by name."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _described(path: Path) -> str:
    mode = f"{path.lstat().st_mode:o}"
    if path.is_symlink():
        return f"{mode} -> {path.readlink()}"
    if not path.is_file():
        return mode
    return f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"
