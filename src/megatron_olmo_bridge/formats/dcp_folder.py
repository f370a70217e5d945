"""Folders of torch.distributed.checkpoint: ``.metadata`` and the files with the tensors' chunks."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Self

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.mapping.placement import Region

from .dcp_metadata import METADATA, Chunk, GlobalTensor, StoredBytes, read_metadata
from .remote_path import AnyPath, RemotePath, for_each
from .tensors import ITEM_SIZE, Piece, StoredArray, TensorView
from .torch_archive import read_archive, read_number, read_tensor


@dataclass(frozen=True)
class DCPFolder:
    """A folder of torch.distributed.checkpoint, by its headers."""

    path: AnyPath
    tensors: dict[str, GlobalTensor]
    objects: dict[str, StoredBytes]
    _read: dict[StoredBytes, StoredArray] = field(default_factory=dict, compare=False, repr=False)
    """Arrays of the archives that were read."""

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read ``.metadata``.

        Raises:
            FormatError, UnsafePickleError, UnsupportedError: see :func:`.read_metadata`.
        """
        if not (path / METADATA).is_file():
            raise FormatError(f"{path}: no {METADATA}: an incomplete save")
        return cls(path, *read_metadata(path))

    def arrays(self, key: str) -> Iterable[tuple[Chunk, StoredArray]]:
        """Yield the chunks of a tensor, each with the array that stores it.

        Raises:
            FormatError: a file is absent, or an archive in it is damaged.
        """
        tensor = self.tensors[key]
        for chunk in tensor.chunks:
            at = chunk.stored
            if not (self.path / at.file).is_file():
                raise FormatError(f"{self.path}: {at.file}, which holds {key}, is absent")
            try:
                array = self._array(at)
            except FormatError as error:
                raise type(error)(f"{key} at {list(chunk.offset)}: {error}") from error
            if array.shape != chunk.shape or array.dtype != tensor.dtype:
                raise FormatError(
                    f"{self.path / at.file}: {key} at {list(chunk.offset)} is {array.dtype} "
                    f"{list(array.shape)}, {METADATA} says {tensor.dtype} {list(chunk.shape)}"
                )
            yield chunk, array

    def _array(self, at: StoredBytes) -> StoredArray:
        if at not in self._read:
            self._read[at] = read_tensor(self.path / at.file, at.offset, at.length)
        return self._read[at]

    def read_ahead(self, keys: Iterable[str]) -> None:
        """Read the archives of tensors, several at a time if the folder is somewhere else.

        Errors are left to :meth:`arrays`, which says what they are about.
        """

        def read(at: StoredBytes) -> None:
            with contextlib.suppress(FormatError):
                self._array(at)

        if isinstance(self.path, RemotePath):
            tensors = (self.tensors[key] for key in keys if key in self.tensors)
            for_each(read, [chunk.stored for t in tensors for chunk in t.chunks], self.path)

    def select(self, prefix: str, suffix: str = "") -> Self:
        """Return the tensors whose keys begin and end so, by the rest of their keys."""
        kept = {
            key[len(prefix) : len(key) - len(suffix)]: tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix) and key.endswith(suffix)
        }
        return replace(self, tensors=kept)

    def number(self, key: str) -> float:
        """Return the value of a float32 tensor without dimensions.

        Raises:
            FormatError: it is another tensor; or see :meth:`arrays`.
        """
        where = f"{self.path}: {key}"
        arrays = [array for _, array in self.arrays(key)]
        if len(arrays) != 1:
            raise FormatError(f"{where}: is stored in {len(arrays)} chunks; a number has one")
        return read_number(arrays[0], where)

    def object(self, key: str) -> Any:
        """Return an object that is not a tensor, as plain values and placeholders."""
        at = self.objects[key]
        return read_archive(self.path / at.file, at.offset, at.length)

    def view(self, key: str) -> TensorView:
        """Return a tensor as a view of the files.

        Raises:
            FormatError: chunks overlap or leave gaps; or see :meth:`arrays`.
        """
        shape = self.tensors[key].shape
        pieces = self.pieces(key, 0).get((), ())
        return TensorView.assembled(f"{self.path}: {key}", shape, pieces)

    def pieces(self, key: str, axes: int) -> dict[tuple[int, ...], list[Piece]]:
        """Return the pieces of a stored tensor at each index of its first ``axes`` axes."""
        pieces: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
        for chunk, array in self.arrays(key):
            offset, shape = chunk.offset[axes:], chunk.shape[axes:]
            whole, left = Region.whole(shape), offset[1] if len(offset) > 1 else 0
            at = Region(offset[0], offset[0] + whole.rows, left, left + whole.columns)
            spans = zip(chunk.offset[:axes], chunk.shape[:axes], strict=True)
            indices = product(*(range(begin, begin + count) for begin, count in spans))
            for number, index in enumerate(indices):  # in the order of the bytes
                begin = array.offset + number * whole.size * ITEM_SIZE[array.dtype]
                part = StoredArray(array.file, begin, shape, array.dtype)
                pieces[index].append(Piece(part, whole, at))
        return pieces
