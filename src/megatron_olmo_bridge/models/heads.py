"""Read from a ``config.json`` whether the model is a language model or a classifier."""

from __future__ import annotations

from typing import Any

from megatron_olmo_bridge.errors import InputError, quote
from megatron_olmo_bridge.formats.hf_folder import CONFIG
from megatron_olmo_bridge.nn.problem_types import check_problem_type

from .hf_values import HFValues

CLASSIFIER = "ForSequenceClassification"
"""Suffix of the class names of classifiers."""


def architectures_of_config(hf_config: dict[str, Any], where: object = CONFIG) -> list[str]:
    """Return the ``architectures`` of a ``config.json`` as a list; there a string is allowed too.

    Raises:
        InputError: They are not names.
    """
    names = hf_config.get("architectures")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: architectures must be a list of names, not {quote(names)}")
    return names


def num_labels_of(hf_config: dict[str, Any]) -> int | None:
    """Return the number of classes of a classification head; None for a language model.

    The default is transformers', 2.

    Raises:
        InputError: ``num_labels``, ``id2label`` and ``problem_type`` contradict each other.
    """
    names = architectures_of_config(hf_config)
    if not names or not names[0].endswith(CLASSIFIER):
        return None
    values = HFValues(hf_config, {"num_labels": 2})
    labels, num_labels = len(values.table("id2label")), values.count("num_labels")
    if labels and "num_labels" in hf_config and labels != num_labels:
        raise InputError(
            f"num_labels is {num_labels}, but id2label has {labels} labels: correct one of them"
        )
    check_problem_type(hf_config.get("problem_type"), labels or num_labels)
    return labels or num_labels
