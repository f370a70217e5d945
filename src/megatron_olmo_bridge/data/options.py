"""Options and progress reports of prepare-data. Needs no numpy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_olmo_bridge.storage.progress import Reporter

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Processes by default: one for each core that this one may use."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How text becomes token ids, and how they are written."""

    tokenizer: str | Path
    """Tokenizer: a folder or a hub id; for token files, the one that made them."""
    workers: int = WORKERS
    """Number of tokenizing processes."""
    text_field: str = "text"
    """Field (.jsonl) or column (.parquet) with the text."""
    txt_documents: str = "line"
    """Document in .txt: each ``line``, or each ``file``."""
    token_dtype: str | None = None
    """Dtype of .npy: uint8, uint16, uint32 or uint64. Default: smallest for the vocabulary."""
    skip_bad_lines: bool = False
    """Skip and count unreadable lines."""
    resume: bool = False
    """Continue an interrupted run, if there is one."""
    overwrite: bool = False
    """Replace the output if it exists."""


class PrepareReporter(Reporter):
    """Reporter that also receives the number of tokens so far."""

    def tokens(self, count: int) -> None:
        """Report that ``count`` tokens have been written in total."""
