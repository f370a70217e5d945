"""List of the families, and the lookup of a ``config.json``'s family."""

from __future__ import annotations

import re
from fnmatch import translate
from functools import cache
from importlib import import_module
from typing import Any

from megatron_olmo_bridge.errors import (
    BridgeError,
    FormatError,
    InputError,
    UnsupportedError,
    quote,
)
from megatron_olmo_bridge.formats.hf_folder import CONFIG

from .bridge import ModelBridge
from .heads import CLASSIFIER, architectures_of_config
from .hf_values import MAX_LABELS, is_count
from .tables import HF_HEAD

FAMILIES = {
    "olmo2": "Olmo2Bridge",
    "olmo3": "Olmo3Bridge",
    "olmo": "OlmoBridge",
    "olmoe": "OlmoeBridge",
    "flex_olmo": "FlexOlmoBridge",
    "gpt2": "GPT2Bridge",
}
"""Folder of each family and the class in its ``bridge.py``, in the order of all lists."""


@cache
def bridges() -> tuple[type[ModelBridge], ...]:
    """Return the bridge class of each family."""
    return tuple(
        getattr(import_module(f"{__package__}.{folder}.bridge"), name)
        for folder, name in FAMILIES.items()
    )


@cache
def _by_architecture() -> dict[str, type[ModelBridge]]:
    return {name: bridge for bridge in bridges() for name in bridge.architectures}


def known_architectures() -> list[str]:
    """Return the values of ``architectures`` and ``model_type`` that a bridge handles."""
    return list(_by_architecture())


def published_sizes() -> dict[str, type[ModelBridge]]:
    """Return every published size by name, with the bridge that handles it."""
    return {name: bridge for bridge in bridges() for name in bridge.sizes}


def bridge_for(hf_config: dict[str, Any], where: object) -> ModelBridge:
    """Return the bridge for a ``config.json``, by ``architectures`` or else by ``model_type``.

    Raises:
        UnsupportedError: No bridge handles it; the message lists the supported ones.
        InputError: ``model_type`` and ``architectures`` name different families.
        BridgeError: A value is invalid for the family.
    """
    bridge = _family_of(hf_config, where)
    try:
        return bridge(hf_config)
    except BridgeError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise FormatError(f"{where}: a value is not of its kind: {error}") from error


def _family_of(hf_config: dict[str, Any], where: object) -> type[ModelBridge]:
    names = architectures_of_config(hf_config, where)
    bridge_by_name, model_type = _by_architecture(), hf_config.get("model_type")
    by_type = bridge_by_name.get(str(model_type))
    by_name = next((bridge_by_name[name] for name in names if name in bridge_by_name), None)
    if by_name and model_type is not None and by_name is not by_type:
        raise InputError(
            f"{where}: architectures {', '.join(names)} are of {by_name.family}, but model_type "
            f"{quote(model_type)} is not: correct one of them"
        )
    if by_name:
        return by_name
    if by_type:
        # A class name with a prefix, such as FSDP's, or that of the base model.
        variants = (*by_type.architectures, by_type.hf_base)
        if not names or any(name.endswith(variants) for name in names):
            return by_type
    unknown = ", ".join(names) or f"model_type {quote(model_type)}"
    raise UnsupportedError(
        f"{where}: architecture {unknown} is not known here. "
        f"Known are: {', '.join(known_architectures())}."
    )


def is_buffer(hf_name: str) -> bool:
    """Return whether some family computes a tensor of this name, so that it is not a weight."""
    return _buffers().fullmatch(hf_name) is not None


def may_be_tied(hf_name: str) -> bool:
    """Return whether some model ties the tensor of this name to another."""
    return hf_name in _tied()


# Cached: both are looked up for every tensor of a file.
@cache
def _buffers() -> re.Pattern[str]:
    patterns = {pattern for bridge in bridges() for pattern in bridge.ignored}
    return re.compile("|".join(map(translate, sorted(patterns))))


@cache
def _tied() -> frozenset[str]:
    return frozenset({HF_HEAD, *(bridge.hf_embedding for bridge in bridges())})


def as_classifier(
    hf_config: dict[str, Any], num_labels: int, where: object = CONFIG
) -> dict[str, Any]:
    """Return the config of the same model with a classification head of ``num_labels`` classes.

    Raises:
        InputError: No head can have that number of classes.
        UnsupportedError: transformers has no such head for the family.
    """
    bridge = _family_of(hf_config, where)
    name = next((n for n in bridge.architectures if n.endswith(CLASSIFIER)), None)
    if name is None:
        names = architectures_of_config(hf_config) or [bridge.family]
        raise UnsupportedError(f"{where}: {names[0]} has no classification head here")
    if not is_count(num_labels, MAX_LABELS):
        raise InputError(f"a head can have 1 to {MAX_LABELS:,} classes, not {num_labels}")
    labels = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    return {
        **hf_config,
        "architectures": [name],
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }
