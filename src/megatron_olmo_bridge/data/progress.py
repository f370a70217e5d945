"""How much is done at once, and who is told. Needs no numpy."""

from __future__ import annotations

import os

from megatron_olmo_bridge.storage.progress import Reporter

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Processes by default: one for each core that this one may use."""


class PrepareReporter(Reporter):
    """Also told how many tokens there are so far."""

    def tokens(self, count: int) -> None:
        """``count`` tokens were written in all."""
