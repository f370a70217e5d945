"""External trackers: TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_olmo_bridge.errors import InputError

from ..config import LoggingConfig


class Tracker(Protocol):
    """Takes numbers by their names, ``group/name``, at a step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Send what is left, and end."""


def trackers(
    settings: LoggingConfig,
    name: str,
    config: dict[str, Any],
    folder: Path | None,
    resumed_at: int | None,
) -> Iterator[Tracker]:
    """Return the trackers that the settings enable.

    Raises:
        InputError: A package is missing, or TensorBoard has no folder to write to.
    """
    if settings.tensorboard:
        if folder is None:
            raise InputError(
                "logging.tensorboard writes into the run's folder: set checkpoint.save"
            )
        yield TensorBoard(folder / "tensorboard", config, resumed_at)
    if settings.wandb_project is not None:
        yield WeightsAndBiases(settings.wandb_project, name, config, folder, resumed_at)


class TensorBoard:
    """Tracker that writes ``RUN/tensorboard``."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed_at: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "logging.tensorboard needs a package: pip install tensorboard"
            ) from None
        # What a killed run logged after its last checkpoint is logged again.
        purge = 0 if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        text = "\n".join(f"    {line}" for line in _pretty(config).splitlines())  # as Markdown code
        self._writer.add_text("config", text, resumed_at or 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a scalar for each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run on wandb.ai, or wherever WANDB_BASE_URL says; WANDB_MODE=offline keeps it here."""

    def __init__(
        self,
        project: str,
        name: str,
        config: dict[str, Any],
        folder: Path | None,
        resumed_at: int | None,
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise InputError("logging.wandb_project needs a package: pip install wandb") from None
        known = folder / "wandb_id.txt" if folder is not None else None
        resumes = resumed_at is not None and known is not None and known.exists()
        self._run = wandb.init(
            project=project,
            name=name,
            config=config,
            resume="allow",
            id=known.read_text().strip() if known is not None and resumes else None,
            dir=str(folder) if folder is not None else None,
        )
        if known is not None:
            known.write_text(f"{self._run.id}\n")
        # W&B's own step only goes up; a run that was killed goes back to its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log them in one call, with the step as the x axis."""
        self._run.log({"step": step} | values)

    def close(self) -> None:
        """Finish the run: it waits until all is sent."""
        self._run.finish()


def _pretty(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, default=str)
