"""Names of the dtypes that weights are converted in."""

from __future__ import annotations

from megatron_olmo_bridge.errors import InputError

from .tensors import ITEM_SIZE

KEEP = "keep"
"""Stands for the source's dtype."""
_ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


def canonical_dtype(dtype: object) -> str:
    """Return torch's name of a dtype, without ``torch.``; unknown text unchanged.

    Args:
        dtype: ``torch.bfloat16``, or text: ``bfloat16``, ``bf16``, ``BF16``, ``torch.bfloat16``.
    """
    name = str(dtype).lower().removeprefix("torch.")
    name = _ALIASES.get(name, name)
    return name if name in ITEM_SIZE else str(dtype)


def parse_dtype(dtype: object, *, keep: bool = True) -> str:
    """Return torch's name of a dtype that weights are converted in, without ``torch.``.

    Args:
        dtype: as for :func:`canonical_dtype`.
        keep: whether ``keep`` is accepted too.

    Raises:
        InputError: the dtype is not known; the message lists those that are.
    """
    name = canonical_dtype(dtype)
    if name in ITEM_SIZE or (keep and name == KEEP):
        return name
    names = [
        f"{known} ({', '.join(alias for alias in _ALIASES if _ALIASES[alias] == known)})"
        for known in ITEM_SIZE
    ]
    raise InputError(f"dtype {str(dtype)!r} is not one of {', '.join([KEEP] * keep + names)}")
