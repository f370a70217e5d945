"""Problem types of a classification head, as ``config.json`` names them."""

from __future__ import annotations

from megatron_olmo_bridge.errors import InputError

REGRESSION = "regression"
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
PROBLEM_TYPES = (REGRESSION, SINGLE_LABEL, MULTI_LABEL)


def check_problem_type(problem_type: str | None, num_labels: int | None) -> None:
    """Check that a classification head can have a problem type.

    Args:
        problem_type: as in ``config.json``; None if it is to be inferred.
        num_labels: rows of the head; None or 0 if the model has no head.

    Raises:
        InputError: the type is not one of :data:`PROBLEM_TYPES`, or contradicts ``num_labels``.
    """
    if problem_type is None:
        return
    if problem_type not in PROBLEM_TYPES:
        raise InputError(f"problem_type is {problem_type!r}, not one of {', '.join(PROBLEM_TYPES)}")
    if not num_labels:
        raise InputError(
            f"problem_type is {problem_type}, but the model has no classification head: set "
            "num_labels too"
        )
    if problem_type == SINGLE_LABEL and num_labels == 1:
        raise InputError(
            f"problem_type {SINGLE_LABEL} needs at least 2 labels, and num_labels is 1: set "
            f"num_labels to 2 for two classes, or problem_type to {REGRESSION}"
        )
