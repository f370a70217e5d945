"""Fetch tensors that are somewhere else: few long ranges, each byte once, straight to its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath
from megatron_olmo_bridge.formats.tensors import MeanView, Readable, TensorView
from megatron_olmo_bridge.mapping.placement import Region

from .plan import CopyPlan, Literal, OutputFile, Payload
from .runs import runs_of

FETCHED = 1 << 20
"""Bytes of a range in memory at a time, while the rest arrives."""
PART = 32 << 20
"""Bytes of a payload that one connection fetches; others fetch the rest meanwhile."""


class Run(NamedTuple):
    """Bytes that are together in a source file and in the output."""

    file: RemotePath
    source_at: int
    target_at: int
    nbytes: int


def remote_runs(view: TensorView, offset: int) -> list[Run]:
    """Return the runs of a tensor that are somewhere else, as it is written at an offset."""
    return [
        Run(piece.array.file, source_at, offset + target_at, nbytes)
        for piece in view.pieces
        if piece.array is not None and isinstance(piece.array.file, RemotePath)
        for source_at, target_at, nbytes in runs_of(piece, view)
    ]


def fetch(
    runs: Iterable[Run],
    write: Callable[[memoryview, int], Any],
    buffer: memoryview,
    pause: Callable[[float], Any],
) -> Iterator[int]:
    """Fetch runs, those that touch in a file by one request; yield how many bytes were written.

    Args:
        runs: the runs, in any order.
        write: writes bytes at an offset of the output.
        buffer: memory that the bytes pass through.
        pause: waits for seconds before another attempt.
    """
    for range_ in _ranges(runs):
        at, left = range_[0].source_at, list(reversed(range_))
        length = range_[-1].source_at + range_[-1].nbytes - at
        for data in range_[0].file.stream(at, length, buffer, pause):
            end = at + len(data)
            while left and left[-1].source_at < end:
                run = left[-1]
                begin = max(run.source_at, at)
                part = data[begin - at : run.source_at + run.nbytes - at]
                write(part, run.target_at + begin - run.source_at)
                if run.source_at + run.nbytes > end:
                    break
                left.pop()
            at = end
            yield len(data)


def _ranges(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Yield lists of runs that follow one another in a file without a gap."""
    by_file = groupby(sorted(runs, key=lambda r: (str(r.file), r.source_at)), key=lambda r: r.file)
    for _, in_file in by_file:
        together: list[Run] = []
        for run in in_file:
            if together and together[-1].source_at + together[-1].nbytes != run.source_at:
                yield together
                together = []
            together.append(run)
        yield together


def connections(files: Iterable[AnyPath]) -> int:
    """Return the number of requests in flight for these files; 0 if all are here."""
    return max((f.files.connections for f in files if isinstance(f, RemotePath)), default=0)


def parts_of(file: OutputFile, plan: CopyPlan) -> Iterator[Literal | Payload]:
    """Yield the parts of an output file, large ones divided if the source is somewhere else."""
    is_remote = bool(connections(plan.source_files))
    for part in file.parts:
        yield from _divided(part) if is_remote and isinstance(part, Payload) else [part]


def _divided(payload: Payload) -> Iterator[Payload]:
    view = payload.view
    assert isinstance(view, Readable)
    is_transposed = any(piece.transposed for stored in view.stored for piece in stored.pieces)
    if is_transposed or payload.nbytes <= PART:  # a part would read the whole transposed array
        yield payload
        return
    rows = Region.whole(view.shape).rows
    step = max(1, PART // max(1, payload.nbytes // max(1, rows)))
    for top in range(0, rows, step):
        bottom = min(rows, top + step)
        offset = payload.offset + payload.nbytes // rows * top
        yield replace(payload, offset=offset, view=_rows(view, top, bottom))


def _rows(view: Readable, top: int, bottom: int) -> Readable:
    region = Region.whole(view.shape)._replace(top=top, bottom=bottom)
    shape = (bottom - top, *view.shape[1:])
    if isinstance(view, MeanView):
        terms = tuple((weight, term.region(region, shape)) for weight, term in view.terms)
        return replace(view, shape=shape, terms=terms)
    return view.region(region, shape)
