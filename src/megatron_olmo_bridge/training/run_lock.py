"""One run at a time in a folder: a lock that a run's first process holds as long as it lives."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.runtime.process_groups import on_first
from megatron_olmo_bridge.storage.lock import HeldError, Lock, ReleasedError, take

from .config import TrainingConfig

LOCK = "run.lock"
"""Name of the lock in a folder that a run is writing into."""
_ATTEMPTS = 100


@contextlib.contextmanager
def exclusive(config: TrainingConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out of the folders that a run writes into; all processes call it.

    Args:
        config: names the folders: ``checkpoint.save`` and those of the exports.
        say: told where the file system has no locks.

    Raises:
        OutputError: another run is at work in one of them, or it can't be written.
    """
    folders = {  # the run's folder last: the error about a folder that is both names that field
        folder.resolve(): f"{field}={folder}"
        for field, folder in reversed(config.output_folders.items())
    }
    with contextlib.ExitStack() as locks:

        def lock_all() -> None:
            for folder, named in folders.items():
                locks.enter_context(_locked(folder, named, say))

        on_first(lock_all)
        yield


@contextlib.contextmanager
def _locked(folder: Path, named: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = _take(folder)
    except HeldError as held:
        raise OutputError(
            f"{named}: another run is at work there{held.holder}. Let it end or stop it, or "
            "name another folder."
        ) from None
    except OSError as error:
        raise OutputError(f"{named}: can't be written: {error.strerror}") from error
    if not lock.is_effective:
        say(f">> {named}: its file system has no locks; see that no other run writes there")
    try:
        yield
    finally:
        lock.release(delete=True)
        with contextlib.suppress(OSError):  # not empty: a run has begun there
            for path in made:
                path.rmdir()


def _take(folder: Path) -> Lock:
    """Create a folder and lock it, also while runs that fail delete their lock and the folder."""
    attempts = itertools.count(1)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return take(folder / LOCK)
        except (FileNotFoundError, ReleasedError):
            if next(attempts) == _ATTEMPTS:
                raise
