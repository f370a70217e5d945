"""Git LFS pointers: what a clone has in the place of large files that were not downloaded."""

from __future__ import annotations

from pathlib import Path

from megatron_olmo_bridge.errors import FormatError

_POINTER = b"version https://git-lfs.github.com/spec/"
"""https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: the first key of a pointer."""
_LARGEST = 1 << 10
"""Bytes of a pointer at most, by the same specification."""


def refuse_pointer(file: Path) -> None:
    """Raise FormatError if the file is a Git LFS pointer."""
    if file.stat().st_size > _LARGEST:
        return
    with file.open("rb") as handle:
        if handle.read(len(_POINTER)) == _POINTER:
            raise FormatError(
                f"{file}: a Git LFS pointer, not the file itself, which was not downloaded. Run "
                "`git lfs pull` in the clone, or download the model with `hf download`."
            )
