"""How long work tells what it does, without knowing of terminals."""

from __future__ import annotations


class Reporter:
    """Told of progress by whatever takes long. This one says nothing; subclass it to show more.

    ``advance`` is called from several threads.
    """

    def begin(self, what: str, total: int) -> None:
        """A task of ``total`` bytes begins."""

    def advance(self, done: int) -> None:
        """``done`` more bytes of the current task."""

    def end(self) -> None:
        """The current task is over."""
