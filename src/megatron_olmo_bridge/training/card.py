"""The model card of a Hugging Face checkpoint that a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_olmo_bridge.storage.hub import hub_repository
from megatron_olmo_bridge.tools.model_card import write_model_card

from .config import TrainingConfig
from .recipes import as_dict


def write_card(
    folder: Path,
    config: TrainingConfig,
    figures: dict[str, float],
    further: dict[str, Any] | None = None,
) -> None:
    """Write the card of an exported checkpoint, unless there is a README.md already.

    Args:
        folder: folder of the checkpoint.
        config: config of the run.
        figures: metrics of the last step and the last evaluation.
        further: additional facts about the training, by label.
    """
    base, data = config.init.hf, [Path(path).name for path in config.data.path]
    facts = {
        "steps": figures.get("step"),
        "tokens": figures.get("tokens"),
        "training loss": figures.get("train_loss"),
        "validation loss": figures.get("validation_loss"),
        **({"data": data} if data else {}),
        "started from": Path(base or config.init.checkpoint or "random weights").name,
        "settings": {
            f"{section}.{name}": str(value).lower() if isinstance(value, bool) else str(value)
            for section in ("train", "optimizer", "schedule")
            for name, value in as_dict(config)[section].items()
            if value is not None
        },
    }
    write_model_card(
        folder,
        name=config.name,
        base=hub_repository(base) if base else None,
        training=facts | (further or {}),
    )
