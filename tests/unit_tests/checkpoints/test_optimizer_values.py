"""Only plain values are carried from one pickle into another."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_olmo_bridge.checkpoints.optimizer_values import check_settings, check_trainer
from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.inert import inert

SETTINGS = {"lr": 1, "initial_lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
SYSTEM = inert("os.system")("rm")
TRAINER = {"global_train_tokens_seen": 5, "max_steps": 9, "epoch": 1, "data_loader": {"seed": 0}}


def test_settings_become_floats_and_others_are_left_out() -> None:
    checked = check_settings({**SETTINGS, "params": ["a"]}, "file")
    assert checked == {**SETTINGS, "betas": (0.9, 0.95)}
    assert type(checked["lr"]) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", SYSTEM), ("lr", None), ("lr", True), ("eps", math.nan), ("weight_decay", math.inf),
        ("betas", SYSTEM), ("betas", 0.9), ("betas", (0.9, SYSTEM)), ("betas", (0.9,)),
    ],
)  # fmt: skip
def test_settings_that_are_not_numbers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"^file: {name} of its optimizer "):
        check_settings({**SETTINGS, name: value}, "file")


def test_a_setting_may_not_be_absent() -> None:
    with pytest.raises(FormatError, match="eps of its optimizer is None, not a number"):
        check_settings({k: v for k, v in SETTINGS.items() if k != "eps"}, "file")


def test_a_trainers_state_is_carried_without_the_rest() -> None:
    assert check_trainer({**TRAINER, "rng": SYSTEM}, "file") == TRAINER


@pytest.mark.parametrize(
    "state",
    [
        SYSTEM, {}, {**TRAINER, "data_loader": SYSTEM}, {**TRAINER, "epoch": SYSTEM},
        {**TRAINER, "data_loader": {"seed": SYSTEM}}, {**TRAINER, "data_loader": {SYSTEM: 0}},
    ],
)  # fmt: skip
def test_a_trainers_state_that_is_not_plain_is_refused(state: Any) -> None:
    with pytest.raises(FormatError, match=r"^file: does not hold a state of OLMo-core's trainer"):
        check_trainer(state, "file")
