"""Find the iterations of a Megatron checkpoint, and the one that its tracker names."""

from __future__ import annotations

import re

from megatron_olmo_bridge.errors import InputError, quote

from .files import TRACKER_LIMIT, read_small
from .remote_path import AnyPath

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for a checkpoint that was converted, not trained."""
_NUMBER = "[0-9]{1,18}"
"""Not ``\\d``, which matches the digits of every script."""
_FOLDER = re.compile(f"iter_({_NUMBER})")
_SHOWN = 20
"""Iterations that a message names."""


def iteration_folder(
    root: AnyPath,
    iteration: int | str | None,
    advice: str = "Name one of these folders, or pass --iteration.",
) -> AnyPath:
    """Return the folder of an iteration under a checkpoint root.

    Args:
        root: the checkpoint.
        iteration: a number or ``release``; None for the one that the tracker names.
        advice: what an error tells the user to do if there are other iterations.

    Raises:
        InputError: there is no such iteration, or no tracker that names one.
        FormatError: the tracker is not a small regular file.
    """

    def refusal(where: AnyPath, why: str) -> InputError:
        names = [folder.name for folder in iteration_folders(root)]
        more = "..., " * (len(names) > _SHOWN)
        present = f"{more}{', '.join(names[-_SHOWN:])}. {advice}" if names else "none."
        return InputError(f"{where}: {why}. Iterations there: {present}")

    where, text = root, str(iteration)
    if iteration is None:
        where = root / TRACKER
        if not where.exists():
            why = "the save was interrupted, or this is not a checkpoint root"
            raise refusal(root, f"no {TRACKER}: {why}")
        text = read_small(where, TRACKER_LIMIT).strip().decode(errors="replace")
        if not text:
            raise refusal(where, "is empty: the save was interrupted")
    if text != RELEASE and not re.fullmatch(_NUMBER, text):
        raise refusal(where, f"{quote(text)} is not an iteration: a number or '{RELEASE}'")
    name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    if not (root / name).is_dir():
        why = f"names {name}, which is not there" if iteration is None else f"has no {name}"
        raise refusal(where, why)
    return root / name


def iteration_folders(root: AnyPath) -> list[AnyPath]:
    """Return every iteration's folder under a checkpoint root, by number, ``release`` last."""
    numbers = {path: iteration_number(path) for path in root.iterdir()}
    numbered = [path for path, number in numbers.items() if number is not None and path.is_dir()]
    release = [root / RELEASE] if (root / RELEASE).is_dir() else []
    return sorted(numbered, key=lambda path: (numbers[path], path.name)) + release


def iteration_number(folder: AnyPath) -> int | None:
    """Return the number of an iteration's folder; None for ``release`` and any other folder."""
    found = _FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else None
