"""Keep signals that ask a run to stop from its helper processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

STOPS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Shield processes started within this context from SIGTERM and Ctrl-C.

    torchrun and Slurm also signal helper processes: data readers, and the one that megatron-core
    starts at its first save and needs for all later ones. Without them, a run that is asked to stop
    could not save. They end with the process that started them.
    """
    resource_tracker.ensure_running()  # it would unblock the signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
