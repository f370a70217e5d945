"""When a step is stopped or skipped, and what a checkpoint keeps of it."""

from __future__ import annotations

import math

import pytest

from megatron_olmo_bridge.errors import TrainingStopped
from megatron_olmo_bridge.training.config import StabilityConfig
from megatron_olmo_bridge.training.stability import Watch

USUAL = [2.0, 2.1, 1.9, 2.0]
"""Mean 2, standard deviation 0.0816."""


def watch(on_spike: str = "stop", seen: list[float] = USUAL, window: int = 8) -> Watch:
    """One that has seen these as losses, and ten times these as gradient norms."""
    made = Watch(StabilityConfig(on_spike=on_spike, sigma=5.0, window=window))
    for step, value in enumerate(seen, 1):
        made.check(step, value)
        made.remember(step, value, 10 * value, skipped=False)
    return made


@pytest.mark.parametrize("on_spike", ["stop", "skip", "ignore"])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_always_stops(on_spike: str, loss: float) -> None:
    with pytest.raises(
        TrainingStopped, match=f"the loss of step 5 is {loss}.*smaller optimizer.lr"
    ):
        watch(on_spike).check(5, loss)


def test_a_spike_is_so_many_deviations_above_the_mean() -> None:
    watch().check(5, 2.40)  # 4.9 standard deviations
    with pytest.raises(TrainingStopped, match=r"spiked to 2\.420 at step 5.*5 standard.*last 4"):
        watch().check(5, 2.42)
    watch().check(5, 0.1)  # falling is welcome


@pytest.mark.parametrize(
    ("window", "first"), [(128, 64), (129, 64), (8, 4), (7, 3), (2, 3)], ids=str
)
def test_the_first_spike_can_be_the_step_in_the_middle_of_the_window(
    window: int, first: int
) -> None:
    """OLMo-core includes the current step too, but one step has no deviation."""
    usual = (USUAL * 32)[: first - 1]
    careful = watch("skip", usual[:-1], window)
    assert not careful.is_spike(99.0, 20.0)
    careful.remember(first - 1, usual[-1], 10 * usual[-1], skipped=False)
    assert careful.is_spike(99.0, 20.0)


def test_only_the_window_counts() -> None:
    with pytest.raises(TrainingStopped):
        watch(seen=[50.0] * 4 + [2.0, 2.1] * 4).check(13, 9.0)


@pytest.mark.parametrize("on_spike", ["skip", "ignore"])
def test_the_others_go_on_after_a_spike(on_spike: str) -> None:
    watch(on_spike).check(5, 99.0)


def test_skipping_looks_at_the_loss_and_at_the_gradient() -> None:
    careful = watch("skip")
    assert careful.may_skip and not watch("stop").may_skip
    assert not careful.is_spike(2.4, 24.0)
    assert careful.is_spike(2.5, 20.0)
    assert careful.is_spike(2.0, 25.0)
    assert careful.is_spike(2.0, math.nan)


def test_a_skipped_step_is_remembered_as_olmo_core_does() -> None:
    careful = watch("skip")
    careful.remember(5, 99.0, math.inf, skipped=True)
    assert list(careful.losses) == [*USUAL, 99.0]
    assert len(careful.norms) == 4  # but nothing that no mean can be made of


def test_a_gradient_that_is_no_number_stops_unless_it_was_skipped() -> None:
    with pytest.raises(TrainingStopped, match=r"gradient of step 5.*stability\.on_spike=skip"):
        watch("ignore").remember(5, 2.0, math.nan, skipped=False)


def test_a_restored_watch_goes_on_as_if_nothing_had_happened() -> None:
    before, after = watch(), watch(seen=[])
    after.restore(before.state())
    assert after.state() == before.state() == {"losses": USUAL, "norms": [10 * x for x in USUAL]}
    with pytest.raises(TrainingStopped):
        after.check(5, 2.42)


def test_a_smaller_window_keeps_the_newest() -> None:
    small = watch(seen=[], window=2)
    small.restore(watch().state())
    assert list(small.losses) == USUAL[-2:]
