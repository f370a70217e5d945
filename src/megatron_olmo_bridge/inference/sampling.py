"""Choose the next token: greedy, or sampled with temperature and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_olmo_bridge.errors import InputError


def choose(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Return a token id, chosen by the logits [vocab_size] of one position.

    Args:
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        top_p: sample among the likeliest tokens that together have this probability.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double().cpu() / temperature).softmax(-1)
    likeliest, ids = probabilities.sort(descending=True, stable=True)
    # A token stays if those before it have not reached top_p yet; the first one always does.
    likeliest[likeliest.cumsum(-1) - likeliest >= top_p] = 0
    return int(ids[torch.multinomial(likeliest, 1, generator=generator)])


def check_request(
    prompt: Sequence[int],
    *,
    vocab_size: int,
    positions: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    """Raise InputError if an option is out of range, or the prompt does not fit the model.

    Args:
        positions: the model's longest sequence; None if it has no limit.
    """
    if not prompt:
        raise InputError("the prompt is empty: give it at least one token")
    if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
        raise InputError(f"token {wrong[0]} is not in the model's vocabulary of {vocab_size}")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise InputError("the temperature must be at least 0, top-p above 0 and at most 1")
    if positions is not None and len(prompt) + max_new_tokens > positions:
        raise InputError(
            f"{len(prompt)} tokens and {max_new_tokens} new ones are more than the model's "
            f"{positions} positions"
        )
