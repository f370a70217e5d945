"""Clone blocks: let an output share them with its source, on file systems that can.

XFS and Btrfs can, and NFS 4.2 servers on them. Nothing is read or written then, and no room is
taken. What is cloned depends on the layout of the files alone (see :mod:`.runs`); whether it is
cloned is tried with one block before anything is written.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath
from megatron_olmo_bridge.formats.tensors import TensorView

from .plan import CopyPlan, OutputFile, Payload
from .runs import BLOCK, runs_of, whole_blocks, worth_kernel_copies

MODES = ("auto", "always", "never")
"""Values of ``--reflink``, as ``cp`` has them."""
_FICLONERANGE = 0x4020940D
"""linux/fs.h: ``_IOW(0x94, 13, struct file_clone_range)``."""
_STEP = 1 << 30
"""Maximum bytes per call, so that Ctrl-C takes effect."""


def clone(source: int, source_at: int, target: int, target_at: int, count: int) -> None:
    """Let an open file share bytes of another; offsets and count are multiples of ``BLOCK``.

    Raises:
        OSError: the file systems can't.
    """
    import fcntl  # not on Windows

    for at in range(0, count, _STEP):
        length = min(_STEP, count - at)
        request = struct.pack("qQQQ", source, source_at + at, length, target_at + at)
        fcntl.ioctl(target, _FICLONERANGE, request)


def can_clone(file: Path, folder: Path) -> bool:
    """Return whether a new file in ``folder`` can share blocks of ``file``, by trying with one."""
    if sys.platform != "linux" or file.stat().st_dev != folder.stat().st_dev:
        return False
    try:
        with file.open("rb") as source:
            _try_in(folder, source.fileno())
    except OSError:
        return False
    return True


def can_clone_within(folder: Path) -> bool:
    """Return whether new files in a folder can share blocks with each other, by trying it."""
    if sys.platform != "linux":
        return False
    try:
        source = os.open(folder, os.O_RDWR | os.O_TMPFILE)
        with os.fdopen(source, "wb") as file:
            file.write(bytes(BLOCK))
            file.flush()
            _try_in(folder, source)
    except OSError:
        return False
    return True


def _try_in(folder: Path, source: int) -> None:
    """Clone the first block of an open file into one that is deleted when it is closed."""
    target = os.open(folder, os.O_RDWR | os.O_TMPFILE)
    try:
        clone(source, 0, target, 0, BLOCK)
    finally:
        os.close(target)


@dataclass
class Clones:
    """What is cloned when a plan is executed."""

    mode: str = "never"
    devices: frozenset[int] = frozenset()
    """Devices (``st_dev``) of the sources that can be cloned."""
    _known: dict[Path, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: CopyPlan, folder: Path, mode: str) -> Clones:
        """Find out what can be cloned.

        Args:
            plan: the plan.
            folder: an existing folder on the disk of the output.
            mode: one of ``MODES``.

        Raises:
            InputError: there is no such mode.
            OutputError: the mode is ``always``, and a source can't be cloned.
        """
        if mode not in MODES:
            raise InputError(f"--reflink {mode}: choose {', '.join(MODES)}")
        if mode == "never":
            return cls(mode)
        by_device: dict[int, Path] = {}
        for file in plan.source_files:
            if isinstance(file, RemotePath):
                if mode == "always":
                    raise OutputError(
                        f"{file}: is on another machine; --reflink always needs files"
                    )
                continue
            status = file.stat()
            if status.st_size >= BLOCK:
                by_device.setdefault(status.st_dev, file)
        able = {device for device, file in by_device.items() if can_clone(file, folder)}
        if mode == "always" and (unable := [by_device[d] for d in by_device if d not in able]):
            raise OutputError(
                f"{folder}: shares no blocks with {unable[0]}, which --reflink always demands: it "
                "takes one file system, such as XFS or Btrfs. --reflink auto copies instead."
            )
        return cls(mode, frozenset(able))

    def allow(self, file: AnyPath) -> bool:
        """Return whether blocks of a source file are cloned."""
        if isinstance(file, RemotePath):
            return False
        if file not in self._known:
            self._known[file] = bool(self.devices) and file.stat().st_dev in self.devices
        return self._known[file]

    def ranges(self, file: OutputFile) -> Iterator[tuple[int, int]]:
        """Yield (offset, bytes) of each range of an output file that is cloned, in order."""
        for payload in file.payloads:
            yield from self._ranges_of(payload)

    def _ranges_of(self, payload: Payload) -> Iterator[tuple[int, int]]:
        view = payload.view
        if not isinstance(view, TensorView) or view.dtype != payload.dtype:
            return
        if not worth_kernel_copies(view):
            return
        for piece in view.pieces:
            if piece.array is not None and self.allow(piece.array.file):
                for source_at, target_at, count in runs_of(piece, view):
                    at = payload.offset + target_at
                    before, shared = whole_blocks(source_at, at, count)
                    if shared:
                        yield at + before, shared

    def copied_ranges(self, file: OutputFile) -> Iterator[tuple[int, int]]:
        """Yield (offset, bytes) of each range of an output file that is not cloned."""
        end = 0
        for offset, count in sorted(self.ranges(file)):
            if offset > end:
                yield end, offset - end
            end = offset + count
        if file.size > end:
            yield end, file.size - end

    def nbytes(self, files: Iterable[OutputFile]) -> int:
        """Return how many bytes of these files are cloned."""
        return sum(count for file in files for _, count in self.ranges(file))
