"""The iterations under the root of a Megatron checkpoint, and the one that its tracker names."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_olmo_bridge.errors import InputError

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_folder(root: Path, iteration: int | str | None) -> Path:
    """The folder of an iteration under a checkpoint root; the tracker's where none is asked for.

    Raises:
        InputError: there is no such iteration, or no tracker that names one.
    """
    tracked = iteration is None
    asked_by = root / TRACKER if tracked else root
    iteration = _tracked(root) if iteration is None else iteration
    try:
        name = "release" if iteration == "release" else f"iter_{int(iteration):07d}"
    except ValueError:
        raise InputError(
            f"{asked_by}: {iteration!r:.80} is no iteration: a number or 'release'. "
            f"{_present(root)}"
        ) from None
    if not (root / name).is_dir():
        why = f"names {name}, which is not there" if tracked else f"has no {name}"
        raise InputError(f"{asked_by}: {why}. {_present(root)}")
    return root / name


def iteration_folders(root: Path) -> list[Path]:
    """Every iteration's folder under a checkpoint root, in order."""
    return sorted(p for p in root.iterdir() if re.fullmatch(r"iter_\d+|release", p.name))


def _tracked(root: Path) -> str:
    tracker = root / TRACKER
    if not tracker.is_file():
        raise InputError(
            f"{root}: no {TRACKER}: the save was interrupted, or this is no checkpoint root. "
            f"{_present(root)}"
        )
    text = tracker.read_bytes()[:100].decode(errors="replace").strip()
    if not text:
        raise InputError(f"{tracker}: is empty: the save was interrupted. {_present(root)}")
    return text


def _present(root: Path) -> str:
    """Which iterations could be asked for instead."""
    names = [folder.name for folder in iteration_folders(root)]
    if not names:
        return "Iterations there: none."
    return f"Iterations there: {', '.join(names)}. Name one of these folders, or pass --iteration."
