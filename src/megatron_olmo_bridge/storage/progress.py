"""Progress reports, independent of terminals."""

from __future__ import annotations


class Reporter:
    """Receives progress reports and ignores them; subclass it to show them.

    ``advance`` is called from several threads.
    """

    def begin(self, what: str, total: int) -> None:
        """Start a task of ``total`` bytes."""

    def advance(self, done: int) -> None:
        """Report ``done`` more bytes of the current task."""

    def end(self) -> None:
        """End the current task."""
