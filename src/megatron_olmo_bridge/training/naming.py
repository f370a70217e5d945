"""How a run's checkpoint takes its name: at every moment the older or the newer one has it."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_olmo_bridge.storage.atomic import PARTIAL, exchange

_REPLACED = f".replaced{PARTIAL}"
"""Ends the name of a complete checkpoint while another one of the same step takes its place, where
the file system can't exchange the two."""
_OLD = f".old{PARTIAL}"


def take_name(partial: Path, folder: Path) -> None:
    """Rename a complete checkpoint to ``folder``.

    One that has the name already is kept under another, which :func:`clean` deletes.
    """
    if not folder.exists():
        partial.rename(folder)
    elif not exchange(partial, folder):
        folder.rename(folder.with_name(folder.name + _REPLACED))
        partial.rename(folder)


def put_back(root: Path) -> None:
    """Give its name back to a checkpoint whose replacement was interrupted between two renames."""
    for replaced in root.glob(f"iter_*{_REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if not folder.exists():
            replaced.rename(folder)


def clean(root: Path) -> None:
    """Delete what saves and deletions left behind, those that were interrupted too."""
    put_back(root)
    for old in root.glob(f"iter_*{_OLD}"):
        shutil.rmtree(old)
    for path in root.glob(f"iter_*{PARTIAL}"):
        delete(path)


def delete(folder: Path) -> None:
    """Delete a checkpoint, of which a kill leaves nothing that looks like one.

    A helper that outlives a killed run, and still writes there, finds no folder of the old name.
    """
    old = folder.with_name(folder.name + _OLD)
    folder.rename(old)
    shutil.rmtree(old)
