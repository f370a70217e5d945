"""Check the values of a pickle that conversions write into other pickles.

The common state of a Megatron checkpoint is unpickled by whoever loads it. So only plain values of
the expected types are carried over: a placeholder for a class would be written as that class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_olmo_bridge.errors import FormatError, quote

SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")
"""Settings of AdamW that are carried; ``initial_lr`` is the peak of the schedule."""
DECAYED = ("all_but_embeddings", "matrices", "all")
"""Which parameters decay: values of the training option ``optimizer.decayed``."""
TRAINER = ("global_train_tokens_seen", "max_steps", "epoch", "data_loader")
"""What is carried of the state of OLMo-core's trainer, besides the number of steps."""
_PLAIN = (bool, int, float, str, type(None))


def check_settings(settings: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the settings of AdamW as floats, ``betas`` as a pair of them.

    Args:
        settings: values by name; others than those of ``SETTINGS`` are left out.
        where: file or folder, for messages.

    Raises:
        FormatError: a value is not a finite number.
    """
    betas = settings.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise FormatError(f"{where}: betas of its optimizer are {quote(betas)}, not two numbers")
    numbers = (name for name in SETTINGS if name != "betas")
    return {
        **{name: _number(name, settings.get(name), where) for name in numbers},
        "betas": (_number("betas", betas[0], where), _number("betas", betas[1], where)),
    }


def _number(name: str, value: Any, where: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise FormatError(f"{where}: {name} of its optimizer is {quote(value)}, not a number")
    return float(value)


def check_trainer(state: Any, where: object) -> dict[str, Any]:
    """Return the fields of ``TRAINER`` of a state of OLMo-core's trainer; None for absent ones.

    Args:
        state: the state, from a pickle.
        where: file, for messages.

    Raises:
        FormatError: it is not a dictionary of plain values, with one for the data loader.
    """
    trainer = {name: state.get(name) for name in TRAINER} if isinstance(state, dict) else {}
    loader = trainer.pop("data_loader", None)
    if not isinstance(loader, dict) or not all(
        type(value) in _PLAIN for value in (*loader, *loader.values(), *trainer.values())
    ):
        raise FormatError(f"{where}: does not hold a state of OLMo-core's trainer")
    return {**trainer, "data_loader": loader}
