"""Check a decoder's attention mask, and tell whether it is plainly causal."""

from __future__ import annotations

import weakref

import torch

from megatron_olmo_bridge.errors import InputError


def check_mask(mask: torch.Tensor, queries: int, keys: int) -> None:
    """Check that a mask is [batch or 1, heads or 1, queries, keys] of bool.

    With a mask of keys alone, [b, 1, 1, keys], megatron-core would let queries see later keys;
    transformers' masks are True where megatron-core's are False.

    Raises:
        InputError: the mask has the wrong shape or dtype.
    """
    if mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[2:] == (queries, keys):
        return
    raise InputError(
        f"attention_mask is {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}: it must "
        f"be bool [batch or 1, 1, {queries}, {keys}], True where a query must not see a key "
        "(megatron_olmo_bridge.nn.classification.padding_mask makes one). For causal attention "
        "without padding, or with padding on the right, pass None."
    )


_last: tuple[weakref.ref[torch.Tensor], int, bool] | None = None
"""Last mask, its version, and whether it is causal: every layer of a model passes the same one."""


def is_causal(mask: torch.Tensor) -> bool:
    """Return whether a mask hides exactly the later keys, like that of Megatron-LM's data loader.

    Synchronizes with the device once for each mask, not once for each layer.
    """
    global _last
    version = 0 if mask.is_inference() else mask._version
    if _last is None or _last[0]() is not mask or _last[1] != version:
        queries, keys = mask.shape[2:]
        later = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
        same = bool((mask == later.triu(keys - queries + 1)).all())
        _last = weakref.ref(mask), version, same
    return _last[2]
