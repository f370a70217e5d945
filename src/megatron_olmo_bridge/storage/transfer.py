"""Copy the bytes of tensors between files: in the kernel if they don't change, else through memory.

There are three ways to copy a range, fastest first: ``copy_file_range``, ``sendfile``, and
``pread`` with ``pwrite``. Each pair of files falls back separately.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath, here
from megatron_olmo_bridge.formats.tensors import (
    ITEM_SIZE,
    MeanView,
    MixedView,
    Piece,
    Readable,
    StoredArray,
    TensorView,
)
from megatron_olmo_bridge.mapping.placement import Region

from .atomic import name_in_errors
from .cloning import Clones, clone
from .fetch import FETCHED, Run, fetch, remote_runs
from .runs import runs_of, whole_blocks, worth_kernel_copies

if TYPE_CHECKING:
    import torch

BLOCK = 4 << 20
"""Bytes of a tensor in memory at a time."""
STEP = 64 << 20
"""Maximum bytes per kernel call, so that progress is visible and Ctrl-C takes effect."""
OPEN_FILES = 16
"""Maximum number of source files that a thread keeps open."""
FALL_BACK = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSOCK,
    errno.EPERM,
    errno.EBADF,
}
"""Errors after which the next way is tried: set by file systems, kernels and seccomp filters."""

_LOG = logging.getLogger(__name__)
CopyMethod = Callable[[int, int, int, int, int], int]
"""Function of (source fd, source offset, target fd, target offset, bytes); returns bytes copied."""


class Interrupted(BaseException):
    """Raised in a thread after another one failed or the user pressed Ctrl-C."""


def _copy_file_range(src: int, src_at: int, dst: int, dst_at: int, count: int) -> int:
    return os.copy_file_range(src, dst, count, src_at, dst_at)


def _sendfile(src: int, src_at: int, dst: int, dst_at: int, count: int) -> int:
    os.lseek(dst, dst_at, os.SEEK_SET)
    return os.sendfile(dst, src, src_at, count)


def _through_memory(src: int, src_at: int, dst: int, dst_at: int, count: int) -> int:
    return write_all(dst, os.pread(src, min(count, BLOCK), src_at), dst_at)


def copy_methods(*, may_clone: bool = True) -> list[CopyMethod]:
    """Return the ways to copy that this system has, fastest first. macOS has only the last.

    Args:
        may_clone: include ``copy_file_range``, by which file systems may share blocks.
    """
    in_kernel = {"sendfile": _sendfile}
    if may_clone:
        in_kernel = {"copy_file_range": _copy_file_range, **in_kernel}
    return [*(copy for name, copy in in_kernel.items() if hasattr(os, name)), _through_memory]


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
    """Write all bytes at an offset; return their number."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


class Transfer:
    """Copies and reads pieces of tensors; keeps files open, so each thread needs its own."""

    def __init__(
        self,
        advance: Callable[[int], None] = lambda _: None,
        stop: threading.Event | None = None,
        methods: Sequence[CopyMethod] | None = None,
        clones: Clones | None = None,
    ) -> None:
        self._advance = advance
        self._stop = stop or threading.Event()
        self._clones = clones or Clones()
        self._methods = list(methods or copy_methods(may_clone=self._clones.mode != "never"))
        self._chosen: dict[tuple[Path, int], int] = {}
        self._sources: dict[Path, int] = {}
        """Open descriptors, least recently used first."""
        self._spare = bytearray()
        self._buffer = bytearray()
        self._last: Readable | None = None
        """Tensor that was read last; ``_matrices`` are of it."""
        self._matrices: dict[StoredArray, torch.Tensor] = {}

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: Any) -> None:
        while self._sources:
            os.close(self._sources.popitem()[1])

    def write(self, view: Readable, dtype: str, target: int, offset: int) -> None:
        """Write the elements of a tensor, row-major, as ``dtype`` at an offset of an open file.

        Raises:
            FormatError: a source file is truncated.
            InputError: a value is too large for ``dtype``.
        """
        if isinstance(view, TensorView) and dtype == view.dtype and worth_kernel_copies(view):
            if runs := remote_runs(view, offset):
                self._fetch(view, runs, target)
                return
            _LOG.debug("%s: copied by the kernel, %d bytes", view.name, view.nbytes)
            for piece in view.pieces:
                for source_at, target_at, count in runs_of(piece, view):
                    self._copy(piece, source_at, target, offset + target_at, count)
            return
        _LOG.debug("%s: through memory, %s to %s", view.name, view.dtype, dtype)
        for top, bottom, data in self.blocks(view):
            out = _cast(data, view.dtype, dtype, partial(_where, view, top, bottom))
            at = top * view.row_bytes // ITEM_SIZE[view.dtype] * ITEM_SIZE[dtype]
            write_all(target, out, offset + at)
            self._advance((bottom - top) * sum(read.row_bytes for read in view.stored))

    def blocks(self, view: Readable) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (first row, last row, bytes) of each block of whole rows, in order.

        The next block overwrites the bytes.
        """
        rows = view.shape[0] if view.shape else 1
        step = max(1, BLOCK // max(1, view.row_bytes))
        for top in range(0, rows, step):
            bottom = min(rows, top + step)
            yield top, bottom, self.read(view, top * view.row_bytes, bottom * view.row_bytes)

    def read(self, view: Readable, begin: int, end: int) -> memoryview:
        """Return a range of the row-major bytes of a tensor. The next call overwrites them.

        Raises:
            FormatError: a source file is truncated.
        """
        if begin == end:
            return memoryview(b"")
        if view is not self._last:
            self._matrices.clear()
            self._last = view
        width = view.row_bytes
        top, bottom = begin // width, -(-end // width)
        if len(self._buffer) < (bottom - top) * width:
            self._buffer = bytearray((bottom - top) * width)
        rows = memoryview(self._buffer)[: (bottom - top) * width]
        self._fill(view, top, bottom, rows)
        return rows[begin - top * width : end - top * width]

    def _fill(self, view: Readable, top: int, bottom: int, out: memoryview) -> None:
        """Read rows of a tensor into ``out``."""
        if isinstance(view, MeanView):
            self._fill_mean(view, top, bottom, out)
        elif isinstance(view, MixedView):
            self._fill_mixed(view, top, bottom, out)
        else:
            for piece in view.pieces:
                self._read_rows(piece, view, top, bottom, out)

    def _fill_mean(self, view: MeanView, top: int, bottom: int, out: memoryview) -> None:
        """Sum in float64 and round to float32: the mean of equal values is then that value, bit for
        bit, for any number and weights. Summed in float32, the mean of three is not."""
        import torch

        torch.set_num_threads(1)  # in this thread, as in _cast
        total = torch.zeros(len(out) // ITEM_SIZE[view.dtype], dtype=torch.float64)
        for weight, term in view.terms:
            rows = memoryview(bytearray((bottom - top) * term.row_bytes))
            self._fill(term, top, bottom, rows)
            total.add_(torch.frombuffer(rows, dtype=getattr(torch, term.dtype)), alpha=weight)
        total /= sum(weight for weight, _ in view.terms)
        mean = memoryview(bytearray(4 * len(total)))
        torch.frombuffer(mean, dtype=torch.float32).copy_(total)
        out[:] = _cast(mean, "float32", view.dtype, lambda: f"the mean of {view.name}")

    def _fill_mixed(self, view: MixedView, top: int, bottom: int, out: memoryview) -> None:
        import torch

        out[:] = bytes(len(out))
        whole = torch.frombuffer(out, dtype=getattr(torch, view.dtype)).view(bottom - top, -1)
        for part in view.parts:
            rows = memoryview(bytearray((bottom - top) * part.row_bytes))
            self._fill(part, top, bottom, rows)
            rows = _cast(rows, part.dtype, view.dtype, partial(_where, part, top, bottom))
            values = torch.frombuffer(rows, dtype=whole.dtype).view(bottom - top, -1)
            for piece in part.pieces:
                at = piece.tensor_region
                inside = slice(max(at.top - top, 0), max(at.bottom - top, 0))
                whole[inside, at.left : at.right] = values[inside, at.left : at.right]

    def _fetch(self, view: TensorView, runs: list[Run], target: int) -> None:
        """Write a tensor whose bytes are somewhere else; those of a new file are zero already."""
        _LOG.debug("%s: fetched, %d bytes", view.name, view.nbytes)
        write, buffer = partial(write_all, target), self._memory(FETCHED)
        for count in fetch(runs, write, buffer, self._stop.wait):
            self._check_stop()
            self._advance(count)
        self._advance(view.nbytes - sum(run.nbytes for run in runs))

    def _copy(self, piece: Piece, source_at: int, target: int, target_at: int, count: int) -> None:
        if piece.array is None:  # the bytes of a new target file are zero
            self._advance(count)
            return
        file = here(piece.array.file)
        if self._clones.allow(file):
            before, shared = whole_blocks(source_at, target_at, count)
            if shared and self._clone(file, source_at + before, target, target_at + before, shared):
                self._copy_range(file, source_at, target, target_at, before)
                done = before + shared
                source_at, target_at, count = source_at + done, target_at + done, count - done
        self._copy_range(file, source_at, target, target_at, count)

    def _clone(self, file: Path, source_at: int, target: int, target_at: int, count: int) -> bool:
        """Share whole blocks; return whether the file system did."""
        self._check_stop()
        try:
            clone(self._fd(file), source_at, target, target_at, count)
        except OSError as error:
            if error.errno not in FALL_BACK or self._clones.mode == "always":
                error.filename = f"{file}, or what is cloned from it"
                raise
            _LOG.warning("%s: copied, as it can't be cloned: %s", file, error)
            return False
        self._advance(count)
        return True

    def _copy_range(
        self, file: Path, source_at: int, target: int, target_at: int, count: int
    ) -> None:
        source = self._fd(file)
        while count:
            self._check_stop()
            chosen = self._chosen.get((file, target), 0)
            method = self._methods[chosen]
            try:
                done = method(source, source_at, target, target_at, min(count, STEP))
            except OSError as error:
                if error.errno not in FALL_BACK or chosen + 1 == len(self._methods):
                    error.filename = f"{file}, or what is copied from it"
                    raise
                self._chosen[file, target] = chosen + 1
                _LOG.debug("%s for %s: %s", method.__name__, file, error)
                continue
            if done == 0:
                raise FormatError(f"{file}: truncated at byte {source_at}")
            source_at, target_at, count = source_at + done, target_at + done, count - done
            self._advance(done)

    def _read_rows(
        self, piece: Piece, view: TensorView, top: int, bottom: int, out: memoryview
    ) -> None:
        """Copy the part of a piece that is in these rows into ``out``."""
        region = piece.tensor_region
        first, last = max(top, region.top), min(bottom, region.bottom)
        if first >= last:
            return
        self._check_stop()
        item = ITEM_SIZE[view.dtype]
        width, left = region.columns * item, region.left * item
        if piece.array is None:
            for row in range(first - top, last - top):
                begin = row * view.row_bytes + left
                out[begin : begin + width] = bytes(width)
            return
        if piece.transposed:
            self._read_transposed(piece, view, first, last, out[(first - top) * view.row_bytes :])
            return
        stride = piece.array.row_bytes
        source_row = piece.array_region.top + first - region.top
        if width == stride == view.row_bytes:
            at = piece.array.offset + source_row * stride
            self._read(piece.array.file, at, out[(first - top) * width : (last - top) * width])
            return
        rows = self.rows(piece.array, source_row, source_row + last - first)
        begin, source_left = (first - top) * view.row_bytes + left, piece.array_region.left * item
        for row in range(last - first):
            at_row = row * stride + source_left
            out[begin : begin + width] = rows[at_row : at_row + width]
            begin += view.row_bytes

    def _read_transposed(
        self, piece: Piece, view: TensorView, first: int, last: int, out: memoryview
    ) -> None:
        """Copy rows ``first`` to ``last``, which are columns of the array.

        A column is spread over the file, so the whole array (some MiB) is read, and kept for the
        next rows.
        """
        import torch

        array, dtype = piece.array, getattr(torch, view.dtype)
        assert array is not None
        if array not in self._matrices:
            data = bytearray(array.nbytes)
            self._read(array.file, array.offset, memoryview(data))
            self._matrices[array] = torch.frombuffer(data, dtype=dtype).view(array.shape)
        stored, region = piece.array_region, piece.tensor_region
        left = stored.left + first - region.top
        block = self._matrices[array][stored.top : stored.bottom, left : left + last - first]
        rows = torch.frombuffer(out, dtype=dtype, count=(last - first) * view.columns)
        rows.view(last - first, -1)[:, region.left : region.right] = block.T

    def rows(self, array: StoredArray, top: int, bottom: int) -> memoryview:
        """Return the bytes of rows of an array. The next call overwrites them.

        Raises:
            FormatError: the file is truncated.
        """
        stride = array.row_bytes
        rows = self._memory((bottom - top) * stride)
        self._read(array.file, array.offset + top * stride, rows)
        return rows

    def _memory(self, size: int) -> memoryview:
        if len(self._spare) < size:
            self._spare = bytearray(size)
        return memoryview(self._spare)[:size]

    def _read(self, file: AnyPath, offset: int, out: memoryview) -> None:
        if isinstance(file, RemotePath):
            file.read_into(offset, out, self._stop.wait)
            return
        fd, done = self._fd(file), 0
        while done < len(out):
            with name_in_errors(file):
                count = _read_into(fd, out[done:], offset + done)
            if count == 0:
                raise FormatError(f"{file}: truncated at byte {os.fstat(fd).st_size}")
            done += count

    def _fd(self, file: Path) -> int:
        fd = self._sources.pop(file, None)
        if fd is None:
            if len(self._sources) >= OPEN_FILES:
                os.close(self._sources.pop(next(iter(self._sources))))
            fd = os.open(file, os.O_RDONLY)
        self._sources[file] = fd
        return fd

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted


def _read_into(fd: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    data = os.pread(fd, len(out), offset)
    out[: len(data)] = data
    return len(data)


def _where(view: Readable, top: int, bottom: int) -> str:
    """Return the name of a tensor and the files that hold these rows, for messages."""
    rows = Region.whole(view.shape)._replace(top=top, bottom=bottom)
    pieces = [p for v in view.stored for p in v.pieces if p.tensor_region.intersect(rows)]
    files = sorted({str(p.array.file) for p in pieces if p.array is not None})
    return f"{', '.join(files)}: {view.name}"


def _cast(data: memoryview, source: str, target: str, where: Callable[[], str]) -> memoryview:
    """Return the values in another dtype, rounded to nearest even as torch does."""
    if source == target:
        return data
    import torch  # needed only to change the dtype

    torch.set_num_threads(1)  # in this thread; the plan is already divided among threads
    values = torch.frombuffer(data, dtype=getattr(torch, source))
    out = bytearray(len(values) * ITEM_SIZE[target])
    cast = torch.frombuffer(out, dtype=getattr(torch, target))
    cast.copy_(values)
    low, high = (bound.item() for bound in values.aminmax())
    limit = torch.finfo(cast.dtype).max
    if not -limit <= low <= high <= limit:  # also true if there are NaNs, which are kept
        too_large = values[values.isfinite() & ~cast.isfinite()]
        if len(too_large):
            raise InputError(
                f"{where()}: {len(too_large)} values are too large for {target} and would become "
                f"infinite ({too_large[0].item():g} is the first). Use --dtype bfloat16 or float32."
            )
    return memoryview(out)
