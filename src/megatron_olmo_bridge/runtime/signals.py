"""Signals that ask a run to stop, and the processes that help it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

STOPS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """Processes started inside don't get SIGTERM and Ctrl-C.

    torchrun and Slurm signal the helpers of a process too: those that read data, and the one that
    megatron-core starts at its first save and needs for all others. With them gone, a run that is
    asked to stop could not save. They end with the process that started them.
    """
    resource_tracker.ensure_running()  # it would unblock the signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
