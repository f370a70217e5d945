"""The processes of one conversion, as started by torchrun."""

from __future__ import annotations

import itertools
import os
from datetime import timedelta
from functools import cache
from typing import Any

_BARRIERS = itertools.count()
"""Number of the next barrier, the same in every process."""
_LONGEST_WAIT = timedelta(days=1)


class Processes:
    """The processes that torchrun started, or only this one.

    They synchronize through torchrun's key/value store. A process group would conflict with one
    that the caller creates, since the default group can't be initialized twice.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = int(os.environ.get("RANK", "0"))

    @property
    def first(self) -> bool:
        return self.index == 0

    def wait_for_each_other(self) -> None:
        """Return when every process has called this."""
        if self.count > 1:
            number = next(_BARRIERS)
            self._arrive(f"{number}/here", wait=True)
            # The store may be in the first process, which must therefore leave last.
            self._arrive(f"{number}/left", wait=self.first)

    def agree(self, value: str) -> bool:
        """Return whether every process called this with the same value; wait for all."""
        if self.count == 1:
            return True
        place = f"olmo-bridge/{next(_BARRIERS)}/value"
        _store().set(f"{place}/{self.index}", value)
        self.wait_for_each_other()
        values = {_store().get(f"{place}/{index}") for index in range(self.count)}
        self.wait_for_each_other()  # all have read before the store may close
        return len(values) == 1

    def _arrive(self, place: str, wait: bool) -> None:
        store = _store()
        if store.add(f"olmo-bridge/{place}", 1) == self.count:
            store.set(f"olmo-bridge/{place}/all", "")
        if wait:
            store.wait([f"olmo-bridge/{place}/all"], _LONGEST_WAIT)


@cache
def _store() -> Any:
    """Return torchrun's store, cached for the process lifetime: dropping it closes the store."""
    import torch.distributed as dist

    store, _, _ = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
    return store
