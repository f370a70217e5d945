"""Which token comes next, by small distributions whose shares are known exactly."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.inference.sampling import check_request, choose

# Halves of halves, so that sums are exact; not in order.
DISTRIBUTION = {0: 0.125, 1: 0.5, 2: 0.125, 3: 0.25}
LOGITS = torch.tensor([math.log(p) for p in DISTRIBUTION.values()])


def drawn(times: int = 4000, *, temperature: float = 1.0, top_p: float = 1.0) -> dict[int, float]:
    """How often each token is chosen in this many draws."""
    generator = torch.Generator().manual_seed(0)
    tokens = Counter(choose(LOGITS, temperature, top_p, generator) for _ in range(times))
    return {token: tokens[token] / times for token in sorted(tokens)}


def test_temperature_0_takes_the_likeliest() -> None:
    assert drawn(3, temperature=0) == {1: 1.0}
    assert drawn(3, temperature=0, top_p=0.1) == {1: 1.0}


def test_of_equally_likely_ones_greedy_takes_the_first() -> None:
    generator = torch.Generator()
    assert choose(torch.tensor([1.0, 5.0, 5.0, 2.0]), 0, 1.0, generator) == 1


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, DISTRIBUTION),
        # Squares of the probabilities, and their square roots, scaled to a sum of 1.
        (0.5, {0: 1 / 22, 1: 16 / 22, 2: 1 / 22, 3: 4 / 22}),
        (2.0, {0: 0.1847, 1: 0.3694, 2: 0.1847, 3: 0.2612}),
        (1e-3, {1: 1.0}),
        (1e6, dict.fromkeys(range(4), 0.25)),
    ],
)
def test_temperature_sharpens_or_flattens(temperature: float, expected: dict[int, float]) -> None:
    assert drawn(temperature=temperature) == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, {1}),
        (0.3, {1}),
        # Exactly reached by the first: no second is needed.
        (0.5, {1}),
        (0.5001, {1, 3}),
        (0.75, {1, 3}),
        # Of two that are equally likely the first comes first.
        (0.7501, {1, 3, 0}),
        (0.875, {1, 3, 0}),
        (0.8751, {1, 3, 0, 2}),
        (1.0, {1, 3, 0, 2}),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    total = sum(DISTRIBUTION[token] for token in kept)
    expected = {token: DISTRIBUTION[token] / total for token in kept}
    assert drawn(top_p=top_p) == pytest.approx(expected, abs=0.025)


def test_a_token_of_no_probability_is_never_chosen() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, 1.0, 1.0, generator) for _ in range(200)} == {1, 3}


def test_large_logits_and_half_precision_do_not_overflow() -> None:
    logits = torch.tensor([60000.0, 60000.0, -60000.0], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, 0.01, 1.0, generator) for _ in range(200)} == {0, 1}


def test_the_temperature_comes_before_top_p() -> None:
    # At temperature 0.5 the likeliest has 16/22 of the probability.
    assert drawn(300, temperature=0.5, top_p=0.7) == {1: 1.0}
    assert drawn(300, temperature=1.0, top_p=0.7).keys() == {1, 3}


# ------------------------------------------------------------------------------ what is asked for

REQUEST: dict[str, Any] = {
    "prompt": [5, 100],
    "vocab_size": 101,
    "positions": 128,
    "max_new_tokens": 126,
    "temperature": 0.0,
    "top_p": 1.0,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 100.0, "top_p": 1e-9},
        {"positions": None, "max_new_tokens": 10**6},
        {"prompt": [0]},
        {"max_new_tokens": 0},
    ],
)
def test_a_sound_request_is_taken(change: dict[str, Any]) -> None:
    check_request(**REQUEST | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "the prompt is empty: give it at least one token"),
        ({"prompt": [1, 101]}, "token 101 is not in the model's vocabulary of 101"),
        ({"prompt": [-1]}, "token -1 is not in the model's vocabulary of 101"),
        *(
            (change, "the temperature must be at least 0, top-p above 0 and at most 1")
            for change in ({"temperature": -0.1}, {"top_p": 0.0}, {"top_p": -0.5}, {"top_p": 1.1})
        ),
        ({"max_new_tokens": 127},
         "2 tokens and 127 new ones are more than the model's 128 positions"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_request(**REQUEST | change)
    assert str(caught.value) == message
