"""What holds for the whole of a run, for its log."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.models.bridge import ModelBridge

from .config import TrainingConfig
from .estimate import flops_per_token, parameter_count
from .monitor.run_log import RunFacts
from .recipes import as_dict


def run_facts(config: TrainingConfig, bridge: ModelBridge, loss_unit: str) -> RunFacts:
    """Return the facts of a run on the current process group."""
    return RunFacts(
        name=config.name,
        steps=config.train.steps,
        tokens_per_step=config.tokens_per_step,
        parameters=parameter_count(bridge),
        flops_per_token=flops_per_token(bridge, config.train.sequence_length),
        processes=dist.get_world_size(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        config=as_dict(config),
        versions={
            "megatron-olmo-bridge": __version__,
            "megatron-core": megatron.core.__version__,
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        loss_unit=loss_unit,
    )


def card_facts(config: TrainingConfig, figures: dict[str, float]) -> dict[str, Any]:
    """What a model card says of the training, by label."""
    of_data = [Path(path).name for path in config.data.path]
    return {
        "steps": figures.get("step"),
        "tokens": figures.get("tokens"),
        "training loss": figures.get("train_loss"),
        "validation loss": figures.get("validation_loss"),
        **({"data": of_data} if of_data else {}),
        "started from": Path(config.init.hf or config.init.checkpoint or "random weights").name,
        "settings": {
            f"{section}.{name}": value
            for section in ("train", "optimizer", "schedule")
            for name, value in as_dict(config)[section].items()
            if value is not None
        },
    }
