"""Options of the conversions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.checkpoints.hf_files import MAX_SHARD_SIZE
from megatron_olmo_bridge.storage.remote_files import CONNECTIONS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ImportOptions(ReadOptions):
    """Options of an import, and of reading its source."""

    dtype: str | torch.dtype = "keep"
    """``keep``, ``float32``, ``bfloat16`` or ``float16``."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    make_vocab_size_divisible_by: int = 1
    """Pad the vocabulary with zero rows to a multiple of N."""
    optimizer: bool = False
    """Import the optimizer state too, so that Megatron continues the run."""
    release: bool = False
    """Write for Megatron-LM older than November 2025: name the iteration ``release``."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ReadOptions):
    """Options of an export, and of reading its source."""

    to: str = "hf"
    """``hf``, or ``olmo-core`` for a training checkpoint of OLMo-core."""
    optimizer: bool = False
    """Export the optimizer state too, so that OLMo-core continues the run."""

    dtype: str | torch.dtype = "keep"
    """``keep``, ``float32``, ``bfloat16`` or ``float16``."""
    iteration: int | str | None = None
    """A number, ``release`` or ``all``. Default: the iteration that the tracker file names."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Maximum bytes of tensors in a file: ``5GB``, ``500MB``."""


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Options of an average."""

    max_connections: int = CONNECTIONS
    """Requests in flight, for checkpoints that are somewhere else."""

    weights: Sequence[float] | None = None
    """Weight of each checkpoint, above 0; divided by their sum. Default: equal."""
    dtype: str | torch.dtype = "keep"
    """``keep`` (if all have the same), ``float32``, ``bfloat16`` or ``float16``."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Maximum bytes of tensors in a file: ``5GB``, ``500MB``."""
