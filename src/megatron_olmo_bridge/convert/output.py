"""Write the output of a conversion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.formats.tensors import Readable
from megatron_olmo_bridge.storage.execute import WriteOptions, execute
from megatron_olmo_bridge.storage.plan import CopyPlan
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import Provenance


def write_output(
    plan: CopyPlan,
    destination: str | Path,
    provenance: Provenance,
    write: WriteOptions | None,
    reporter: Reporter | None,
) -> None:
    """Execute a plan whose output is a checkpoint; for arguments and errors see :func:`execute`."""
    execute(plan, Path(destination).expanduser(), provenance, write, reporter, _tensors)


def _tensors(folder: Path) -> Iterable[Readable]:
    """Return the Hugging Face tensors of an output that is written, but not yet committed."""
    return open_checkpoint(folder, finished=False).tensors.values()
