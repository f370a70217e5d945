"""Default number of workers, and progress reports. Needs no numpy."""

from __future__ import annotations

import os

from megatron_olmo_bridge.storage.progress import Reporter

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Processes by default: one for each core that this one may use."""


class PrepareReporter(Reporter):
    """Reporter that also receives the number of tokens so far."""

    def tokens(self, count: int) -> None:
        """Report that ``count`` tokens have been written in total."""
