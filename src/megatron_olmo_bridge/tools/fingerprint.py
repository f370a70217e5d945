"""Compute the fingerprint of a checkpoint's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.storage.atomic import replace_file
from megatron_olmo_bridge.storage.fetch import connections
from megatron_olmo_bridge.storage.fingerprint import (
    HashedTensor,
    encode_leaves,
    hash_tensors,
    root_of,
)
from megatron_olmo_bridge.storage.hub import locate
from megatron_olmo_bridge.storage.plan import WORKERS
from megatron_olmo_bridge.storage.progress import Reporter


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a checkpoint, and the hashes that it was computed from."""

    root: str
    """The fingerprint: 64 hexadecimal digits."""
    tensors: list[HashedTensor]
    """Hugging Face tensors with the hash of each block, in the order of the specification."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def block_count(self) -> int:
        """Number of blocks of all tensors."""
        return sum(len(tensor.blocks) for tensor in self.tensors)


def fingerprint(
    path: str | Path,
    options: ReadOptions | None = None,
    *,
    workers: int = WORKERS,
    reporter: Reporter | None = None,
) -> Fingerprint:
    """Return the fingerprint of a checkpoint's weights, which is the same in every format.

    Config, tokenizer, padding rows and optimizer state are not part of it.

    Args:
        path: path, address or hub id of a checkpoint of any kind.
        options: facts that the checkpoint may not record.
        workers: number of threads. Each holds a few MiB of a tensor.
        reporter: receives progress.

    Raises:
        BridgeError: the path is not a checkpoint, is damaged, or changed meanwhile.
    """
    reporter, options = reporter or Reporter(), options or ReadOptions()
    found = locate(path, connections=options.max_connections)
    checkpoint, workers = open_checkpoint(found, options), max(workers, connections([found]))
    views = checkpoint.tensors.values()
    reporter.begin("fingerprinting", sum(view.nbytes for view in views))
    hashed = hash_tensors(views, workers, reporter)
    reporter.end()
    checkpoint.snapshot.check_unchanged()
    return Fingerprint(root_of(hashed), sorted(hashed, key=lambda tensor: tensor.name.encode()))


def check_leaves_file(file: Path | None) -> None:
    """Raise OutputError, before any work is done, if a file of leaves can't be created."""
    if file is None:
        return
    if file.exists():
        raise OutputError(f"--leaves {file}: exists already; name another file")
    if not file.parent.is_dir():
        raise OutputError(f"--leaves {file}: no such folder: {file.parent}")


def write_leaves(file: Path, of: Fingerprint) -> None:
    """Write the hashes of all blocks, for :func:`verify_against`.

    Raises:
        OutputError: the file can't be written.
    """
    try:
        replace_file(file, encode_leaves(of.tensors))
    except OSError as error:
        raise OutputError(f"{file}: can't be written: {error.strerror}") from error
