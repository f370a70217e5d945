"""What a conversion can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.checkpoints.hf_files import MAX_SHARD_SIZE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ImportOptions(ReadOptions):
    """Options of an import, and of reading its source."""

    dtype: str | torch.dtype = "keep"
    """``keep``, ``float32``, ``bfloat16`` or ``float16``; also ``bf16`` or a torch dtype."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    make_vocab_size_divisible_by: int = 1
    """Pad the vocabulary with zero rows up to a multiple of this."""
    release: bool = False
    """Name the iteration ``release``, for Megatron-LM older than November 2025."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ReadOptions):
    """Options of an export, and of reading its source; ``iteration`` may also be ``all``."""

    dtype: str | torch.dtype = "keep"
    """``keep``, ``float32``, ``bfloat16`` or ``float16``; also ``bf16`` or a torch dtype."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Most bytes of tensors in a file: a number, or a text such as ``5GB``."""


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Options of an average."""

    weights: Sequence[float] | None = None
    """A share for each source, above 0; they are divided by their sum. None counts all the same."""
    dtype: str | torch.dtype = "keep"
    """``keep`` (all sources must have the same then), or as for :class:`ExportOptions`."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Most bytes of tensors in a file: a number, or a text such as ``5GB``."""
