"""External trackers: TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any, Protocol

from megatron_olmo_bridge.errors import InputError

from ..config import LoggingConfig


class Tracker(Protocol):
    """Receiver of the values of a run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step, by ``group/name``."""

    def close(self) -> None:
        """Write or send the remaining values."""


def trackers(
    settings: LoggingConfig,
    name: str,
    config: dict[str, Any],
    folder: Path | None,
    resumed_at: int | None,
) -> Iterator[Tracker]:
    """Yield the trackers that the settings enable.

    Raises:
        InputError: a package is missing, or TensorBoard has no folder to write to.
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
    """TensorBoard's event files in ``tensorboard/`` of the run's folder."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed_at: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "logging.tensorboard needs a package: pip install tensorboard"
            ) from None
        # Steps after the last checkpoint will be logged again: drop what a killed run logged.
        purge = 0 if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", indent(text, " " * 4), resumed_at or 0)  # Markdown code

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the remaining values."""
        self._writer.close()


class WeightsAndBiases:
    """Run of Weights & Biases: on wandb.ai or at WANDB_BASE_URL; local with WANDB_MODE=offline."""

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
        id_file = folder / "wandb_id.txt" if folder is not None else None
        run_id = None
        if resumed_at is not None and id_file is not None and id_file.exists():
            run_id = id_file.read_text().strip()
        self._run = wandb.init(
            project=project,
            name=name,
            config=config,
            resume="allow",
            id=run_id,
            dir=str(folder) if folder is not None else None,
        )
        if id_file is not None:
            id_file.write_text(f"{self._run.id}\n")
        # W&B's own step can't decrease, but a killed run resumes from an earlier step.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values in one call, with the step as the x axis."""
        self._run.log({"step": step} | values)

    def close(self) -> None:
        """Wait until all values are sent, and finish the run."""
        self._run.finish()
