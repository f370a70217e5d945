"""Several processes on one conversion, as torchrun starts them."""

from __future__ import annotations

import os
from typing import Any


class Processes:
    """This process among those that torchrun started; alone if it started none."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = int(os.environ.get("RANK", "0"))

    @property
    def first(self) -> bool:
        return self.index == 0

    def __enter__(self) -> Processes:
        if self.count > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")
        return self

    def wait_for_each_other(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.count > 1 and kind is None:
            import torch.distributed as dist

            dist.destroy_process_group()
