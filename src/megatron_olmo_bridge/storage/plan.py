"""Copy plan: which bytes of which output file come from where."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE, MeanView, TensorSpec, TensorView

from .identity import Identity, Snapshot, identity_digest
from .runs import BLOCK, shared_residue

WORKERS = 2
"""Default number of threads: one copies while the other waits for the disk."""


@dataclass(frozen=True)
class Literal:
    """Bytes known in advance: a header, or the rest of an archive."""

    offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Payload:
    """The elements of a tensor, row-major, as ``dtype``."""

    offset: int
    view: TensorSpec
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.view.nbytes // ITEM_SIZE[self.view.dtype] * ITEM_SIZE[self.dtype]

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(view.nbytes for view in self.view.stored)


@dataclass(frozen=True)
class OutputFile:
    """A file with weights; bytes that no part covers are zero."""

    name: str
    size: int
    parts: tuple[Literal | Payload, ...]

    @property
    def payloads(self) -> Iterable[Payload]:
        return (part for part in self.parts if isinstance(part, Payload))


@dataclass(frozen=True)
class CopyPlan:
    """Everything that a conversion writes, known from headers alone.

    File names are relative to the output.
    """

    operation: str
    """``import``, ``export`` or ``average``."""
    source: AnyPath | None
    """Folder with the weights (the first of several); None for a live model."""
    files: tuple[OutputFile, ...]
    texts: dict[str, bytes]
    """Content of small files, written after the weights."""
    weights_folder: str
    """Folder of the checkpoint: ``iter_0000000``, or ``.`` for Hugging Face."""
    tracker: tuple[str, bytes] | None = None
    """Name and content of the tracker file, written last."""
    notes: tuple[str, ...] = ()
    """Notes about the source for the user."""
    snapshots: tuple[Snapshot, ...] = ()
    """Identities of the source files before the headers were read."""

    @property
    def payloads(self) -> Iterable[Payload]:
        return (payload for file in self.files for payload in file.payloads)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of weights to read."""
        return sum(p.source_bytes for p in self.payloads)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name, except the record and the tracker."""
        return {f.name: f.size for f in self.files} | {n: len(d) for n, d in self.texts.items()}

    @cached_property
    def output_bytes(self) -> int:
        return sum(self.sizes.values())

    @cached_property
    def source_files(self) -> list[AnyPath]:
        """Source files in the order of their first use."""
        pieces = (x for p in self.payloads for view in p.view.stored for x in view.pieces)
        return list(dict.fromkeys(piece.array.file for piece in pieces if piece.array))

    @cached_property
    def source_identities(self) -> dict[AnyPath, Identity]:
        """Identity of each source file before the headers were read."""
        known = {f: identity for s in self.snapshots for f, identity in s.files.items()}
        return {file: known.get(file) or Identity.of(file) for file in self.source_files}

    @cached_property
    def source_digest(self) -> str:
        """Digest of the source files' identities; their order determines an average's weights."""
        return identity_digest(self.source_identities)

    def check_sources_unchanged(self) -> None:
        """Raise InputError if a source file has changed since the plan was made."""
        for snapshot in self.snapshots:
            snapshot.check_unchanged(set(self.source_files))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan: equal for equal headers and options, independent of folder names."""
        sha = hashlib.sha256(f"{self.operation}\n".encode())
        names = {file: file.name for file in self.source_files}
        for file in self.files:
            sha.update(f"{file.name} {file.size}\n".encode())
            for part in file.parts:
                if isinstance(part, Literal):
                    sha.update(b"%d " % part.offset + hashlib.sha256(part.data).digest())
                    continue
                sha.update(f"{part.offset} {part.dtype} {part.view.dtype}".encode())
                if isinstance(part.view, MeanView):
                    sha.update(f" {[(w, view.dtype) for w, view in part.view.terms]}".encode())
                for piece in (p for view in part.view.stored for p in view.pieces):
                    array = piece.array
                    at = f"{names[array.file]} {array.offset} {array.shape}" if array else "zeros"
                    sha.update(f" {at} {piece.array_region} {piece.tensor_region}".encode())
        for name, data in self.texts.items():
            sha.update(f"{name} ".encode() + hashlib.sha256(data).digest())
        return sha.hexdigest()


class Packer:
    """Packs parts into files of at most ``limit`` bytes, unless a single part is larger."""

    def __init__(self, name: Callable[[int], str], limit: int, alignment: int) -> None:
        self._name, self._limit, self._alignment = name, limit, alignment
        self._files: list[list[Literal | Payload]] = [[]]

    def add(
        self, before: bytes, payload: TensorView | None, dtype: str, after: bytes
    ) -> tuple[str, int, int]:
        """Add a payload between two literals; return file, offset and length of the whole."""
        nbytes = Payload(0, payload, dtype).nbytes if payload else 0
        length = len(before) + nbytes + len(after)
        residue = shared_residue(payload, dtype)
        end = _end(self._files[-1])
        start = self._start(end, len(before), residue)
        if end and start + length > self._limit:
            self._files.append([])
            start = self._start(0, len(before), residue)
        parts = self._files[-1]
        parts.append(Literal(start, before))
        if payload:
            parts.append(Payload(start + len(before), payload, dtype))
        if after:
            parts.append(Literal(start + len(before) + nbytes, after))
        return self._name(len(self._files) - 1), start, length

    def _start(self, end: int, before: int, residue: int | None) -> int:
        """Return where the next part begins: aligned, or so that its payload can be cloned."""
        if residue is None:
            return end + -end % self._alignment
        return end + (residue - before - end) % BLOCK

    def files(self) -> tuple[OutputFile, ...]:
        """Return all files."""
        files = enumerate(filter(None, self._files))
        return tuple(OutputFile(self._name(i), _end(parts), tuple(parts)) for i, parts in files)


def _end(parts: list[Literal | Payload]) -> int:
    return parts[-1].offset + parts[-1].nbytes if parts else 0
