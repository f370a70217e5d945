"""Execute a copy plan: divide its files among threads and processes, sync, and commit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_olmo_bridge.errors import BridgeError, InputError, OutputError
from megatron_olmo_bridge.formats.tensors import Readable

from .atomic import name_in_errors
from .cloning import Clones
from .fetch import connections, parts_of
from .fingerprint import hash_tensors, root_of
from .plan import WORKERS, CopyPlan, Literal, OutputFile, Payload
from .processes import Processes
from .progress import Reporter
from .provenance import PROVENANCE, Provenance
from .stage import Stage
from .transfer import Interrupted, Transfer, write_all

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How an output is written."""

    workers: int = WORKERS
    """Threads of each process. torchrun adds processes."""
    resume: bool = False
    """Continue an interrupted run, if there is one."""
    overwrite: bool = False
    """Replace the output if it exists."""
    checksum: bool = False
    """Record the SHA-256 of each file and the fingerprint of the weights (reads all twice more)."""
    reflink: str = "auto"
    """Share blocks with the source where the file system can (XFS, Btrfs): ``auto``, ``always`` or
    ``never``, as in ``cp``."""


def execute(
    plan: CopyPlan,
    destination: Path,
    provenance: Provenance,
    options: WriteOptions | None = None,
    reporter: Reporter | None = None,
    read_back: Callable[[Path], Iterable[Readable]] | None = None,
) -> None:
    """Write the output of a plan to ``destination``, completely or not at all.

    Under torchrun the files are divided among the processes.

    Args:
        plan: what to write.
        destination: folder to create.
        provenance: what to record.
        options: how to write; defaults if None.
        reporter: receives progress.
        read_back: function of the folder with the written weights that returns their Hugging Face
            tensors. With checksums, the fingerprint of these is recorded.

    Raises:
        OutputError: the output exists, overlaps the source, was changed by another program, or the
            disk is full.
        FormatError: a source file is truncated.
        InputError: a source changed while it was read.
    """
    reporter, options = reporter or Reporter(), options or WriteOptions()
    workers = max(options.workers, connections(plan.source_files))
    processes = Processes()
    stage = _stage(plan, destination, options)
    # Compared before the first process writes. Inodes may differ between machines.
    seen = [(i.size, i.mtime_ns, i.tag) for i in plan.source_identities.values()]
    if not processes.agree(f"{plan.digest} {seen}"):
        raise InputError(
            f"{plan.source}: the processes read different headers or files. Did it change "
            "meanwhile? Run it again when nothing writes there."
        )
    if processes.first:
        with cleaning_up(stage):
            stage.open()
    processes.wait_for_each_other()
    if not stage.finished:
        done_before = sum(
            p.source_bytes for f in plan.files if f.name in stage.complete for p in f.payloads
        )
        reporter.begin(f"{plan.operation.removesuffix('e')}ing", plan.source_bytes)
        reporter.advance(done_before)
        todo = [f for f in plan.files if f.name not in stage.complete]
        mine = share(todo, processes.count)[processes.index]
        _LOG.info(
            "%s of %s into %s: %d bytes in %d files, by %d threads of %d processes",
            plan.operation, plan.source, stage.folder, plan.output_bytes, len(plan.files), workers,
            processes.count,
        )  # fmt: skip
        with cleaning_up(stage):
            parts = {file.name: deque(parts_of(file, plan)) for file in mine}
            _write_files(parts, stage, workers, reporter, record=processes.first)
            processes.wait_for_each_other()
            plan.check_sources_unchanged()  # after all processes have read
            processes.wait_for_each_other()
            if processes.first:
                finish(stage, plan, provenance, options, read_back)
        reporter.end()
    if processes.first:
        stage.check_output()
        _LOG.info("%s: complete", destination)
    processes.wait_for_each_other()


def check_output(plan: CopyPlan, destination: Path, options: WriteOptions) -> Clones:
    """Raise the errors that :func:`execute` would raise before it writes anything.

    Returns:
        What would be cloned.

    Raises:
        OutputError: the output exists, overlaps the source, can't be written or the disk is full.
    """
    return _stage(plan, destination.expanduser(), options).clones


def _stage(plan: CopyPlan, destination: Path, options: WriteOptions) -> Stage:
    return Stage(
        destination,
        plan,
        resume=options.resume,
        overwrite=options.overwrite,
        reflink=options.reflink,
    )


def finish(
    stage: Stage,
    plan: CopyPlan,
    provenance: Provenance,
    options: WriteOptions | None = None,
    read_back: Callable[[Path], Iterable[Readable]] | None = None,
) -> None:
    """Write the small files after the weights, and commit; for arguments see :func:`execute`."""
    options = options or WriteOptions()
    for name, data in plan.texts.items():
        stage.write_text(name, data)
    files = _describe(plan, stage.folder, options)
    root = None
    if options.checksum and read_back is not None:
        root = root_of(hash_tensors(read_back(stage.folder / plan.weights_folder), options.workers))
    stage.write_text(f"{plan.weights_folder}/{PROVENANCE}", provenance.encode(plan, files, root))
    stage.commit()


def share(files: Iterable[OutputFile], count: int) -> list[list[OutputFile]]:
    """Divide files evenly by bytes: the largest first, each to the smallest share so far."""
    shares: list[list[OutputFile]] = [[] for _ in range(count)]
    filled = [0] * count
    for file in sorted(files, key=lambda f: (-f.size, f.name)):
        least = filled.index(min(filled))
        shares[least].append(file)
        filled[least] += file.size
    return [sorted(s, key=lambda f: f.name) for s in shares]


class _Work:
    """Queue of the parts of files that are not yet written.

    A thread continues with its file, since the kernel allows one writer per file at a time. When
    every file has been started, it helps with the one that has the most bytes left.
    """

    def __init__(self, parts: dict[str, deque[Literal | Payload]]) -> None:
        self._lock = threading.Lock()
        self._parts = parts
        self._unwritten = {name: len(queue) for name, queue in parts.items()}
        self._untouched = deque(self._parts)

    def take(self, name: str | None) -> tuple[str, Literal | Payload] | None:
        """Return the next part for a thread, from the file it last wrote if that has any left."""
        with self._lock:
            if name is None or not self._parts[name]:
                name = self._untouched.popleft() if self._untouched else self._largest_rest()
            return None if name is None else (name, self._parts[name].popleft())

    def _largest_rest(self) -> str | None:
        bytes_left = {n: sum(p.nbytes for p in parts) for n, parts in self._parts.items() if parts}
        return max(bytes_left, key=bytes_left.__getitem__, default=None)

    def written(self, name: str) -> bool:
        """Count a written part; return whether the file is complete."""
        with self._lock:
            self._unwritten[name] -= 1
            return not self._unwritten[name]


def _write_files(
    parts: dict[str, deque[Literal | Payload]],
    stage: Stage,
    workers: int,
    reporter: Reporter,
    record: bool,
) -> None:
    """Write files with several threads; another thread syncs each finished file.

    The error of a failing thread is raised after the others have stopped.
    """
    stop = threading.Event()
    work = _Work(parts)

    def sync(name: str) -> None:
        with (stage.folder / name).open("rb+") as handle, name_in_errors(stage.folder / name):
            os.fsync(handle.fileno())
        _LOG.debug("%s: written and synced", name)
        if record:
            stage.record(name)

    def write() -> list[Future[None]]:
        name, syncs = None, []
        with (
            Transfer(reporter.advance, stop, clones=stage.clones) as transfer,
            ExitStack() as open_files,
        ):
            while taken := work.take(name):
                if taken[0] != name:
                    open_files.close()
                    name = taken[0]
                    # Each thread needs its own descriptor: sendfile moves the position.
                    fd = os.open(stage.folder / name, os.O_RDWR)
                    open_files.callback(os.close, fd)
                part = taken[1]
                with name_in_errors(stage.folder / name):
                    if isinstance(part, Literal):
                        write_all(fd, part.data, part.offset)
                    else:
                        assert isinstance(part.view, Readable)
                        transfer.write(part.view, part.dtype, fd, part.offset)
                if work.written(name):
                    syncs.append(syncer.submit(sync, name))
        return syncs

    with ThreadPoolExecutor(1) as syncer, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(write) for _ in range(workers)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(not f.done() or f.exception() for f in futures):
                stop.set()
        for error in filter(None, (future.exception() for future in futures)):
            if not isinstance(error, Interrupted):
                raise error
        for future in futures:
            for done in future.result():
                done.result()


def _describe(
    plan: CopyPlan, folder: Path, options: WriteOptions
) -> dict[str, dict[str, int | str]]:
    """Return the size, and optionally the SHA-256, of each file of the checkpoint."""
    described: dict[str, dict[str, int | str]]
    described = {name: {"bytes": size} for name, size in sorted(plan.sizes.items())}
    if options.checksum:
        with ThreadPoolExecutor(options.workers) as pool:
            digests = pool.map(sha256, (folder / name for name in described))
            for entry, digest in zip(described.values(), digests, strict=True):
                entry["sha256"] = digest
    prefix = "" if plan.weights_folder == "." else f"{plan.weights_folder}/"
    return {name.removeprefix(prefix): value for name, value in described.items()}


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, read in blocks."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def cleaning_up(stage: Stage) -> Iterator[None]:
    """If the block fails, keep what can be resumed and discard the rest.

    After a :class:`BridgeError`, which would occur again, nothing is kept. After a full disk or
    another system error the complete files are kept, and the error says so. After an interruption
    everything is kept.
    """
    try:
        yield
    except BridgeError:
        stage.discard()
        raise
    except OSError as error:
        folder = stage.folder if stage.folder.exists() else stage.destination
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where = folder if full else error.filename or folder
        what = "the disk is full" if full else error.strerror or str(error)
        kept = "Nothing was kept."
        if stage.complete:
            stage.close()
            advice = "make room and pass --resume" if full else "pass --resume to continue"
            kept = f"What is complete is kept in {folder}: {advice}."
        else:
            with contextlib.suppress(OSError):  # the marker is deleted last
                stage.discard()
        raise OutputError(f"{where}: {what}. {kept}") from error
    except BaseException:
        stage.close()
        raise
