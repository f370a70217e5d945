"""Run ``olmo-bridge`` and kill it at a point: ``killable.py POINT FILE_BYTES import SRC DST ...``

POINT is where the process kills itself: one of POINTS below, some with a count after a colon. At
``stopped`` it stops itself (SIGSTOP) after the first file is journaled, until SIGCONT. ``none``
runs the command unchanged. FILE_BYTES is the maximum size of a .distcp file, so that a small model
takes several; 0 keeps the default.
"""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.convert import to_megatron
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER, Stage
from megatron_olmo_bridge.storage.transfer import Transfer

POINTS = {
    "allocated": "after all files were allocated, before the first tensor",
    "data": "in the middle of the data: before the n-th tensor",
    "record": "before the n-th file, complete and synced, is recorded in the journal",
    "text": "among the small files that come after the weights: before the n-th",
    "rename": "before the n-th rename of a folder",
    "tracker": "after the rename, before the tracker is written",
    "marker": "after the tracker, before the marker is removed",
    "removal": "while a folder is removed: after its contents, before its marker",
    "cleared": "after an earlier run's leftovers were deleted, before the marker has the new plan",
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(
    owner: Any,
    name: str,
    then: Callable[[], None],
    nth: int = 1,
    only: Callable[..., bool] = lambda *_: True,
) -> None:
    """Call ``then`` before the n-th call of a function, of those calls that ``only`` accepts."""
    original, count = getattr(owner, name), itertools.count(1)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if only(*args) and next(count) == nth:
            then()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def prepare(point: str) -> None:
    kind, _, n = point.partition(":")
    nth = int(n or 1)
    match kind:
        case "allocated":
            before(Transfer, "write", die)
        case "data":
            before(Transfer, "write", die, nth)
        case "record":
            before(Stage, "record", die, nth)
        case "text":
            before(Stage, "write_text", die, nth)
        case "rename":
            before(Path, "rename", die, nth)
        case "tracker":
            before(Stage, "_finish", die)
        case "marker":
            before(Path, "unlink", die, only=lambda path: path.name == PARTIAL_MARKER)
        case "removal":
            before(shutil, "rmtree", die, only=lambda p: (Path(p) / PARTIAL_MARKER).exists())
        case "cleared":
            before(os, "truncate", die)
        case "stopped":
            record, count = Stage.record, itertools.count(1)

            def stop(*args: Any) -> None:
                record(*args)
                if next(count) == 1:
                    os.kill(os.getpid(), signal.SIGSTOP)

            Stage.record = stop
        case "none":
            pass
        case _:
            raise SystemExit(f"{point!r} is not one of {', '.join(POINTS)}, stopped, none")


def main(point: str, file_bytes: str, *command: str) -> None:
    to_megatron.FILE_BYTES = int(file_bytes) or to_megatron.FILE_BYTES
    prepare(point)
    app(list(command))


if __name__ == "__main__":
    main(*sys.argv[1:])
