"""Values are refused one by one; the tables of ranges and choices are complete."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.training.config import (
    CHOICES,
    RANGES,
    ClassificationConfig,
    StepsConfig,
    TrainingConfig,
    check_values,
)

RANGED = [key for _, keys in RANGES.values() for key in keys]


def run(**values: Any) -> TrainingConfig:
    return TrainingConfig(train=StepsConfig(steps=1), **values)


def test_what_can_be_is_let_through() -> None:
    check_values(run())
    check_values(run(classification=ClassificationConfig(patience=3)))


def test_every_number_of_the_config_has_a_range() -> None:
    sections = [(f.name, getattr(run(), f.name)) for f in fields(TrainingConfig)]
    sections.append(("classification", ClassificationConfig()))
    numbers = {
        f"{name}.{f.name}"
        for name, section in sections
        if is_dataclass(section)
        for f in fields(section)
        if f.type in ("int", "float", "int | None", "float | None")
    }
    assert numbers == {key for key in RANGED if not key.startswith("provider.")}
    assert len(set(RANGED)) == len(RANGED)


@pytest.mark.parametrize("key", [key for key in RANGED if not key.startswith("provider.")])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_no_number_is_negative_or_none(key: str, value: float) -> None:
    section, _, name = key.partition(".")
    config = run(classification=ClassificationConfig())
    setattr(getattr(config, section), name, value)
    with pytest.raises(InputError, match=f"^{key}={value} must be "):
        check_values(config)


@pytest.mark.parametrize("key", CHOICES)
def test_choices(key: str) -> None:
    section, _, name = key.partition(".")
    config = run()
    for choice in CHOICES[key]:
        setattr(getattr(config, section), name, choice)
        check_values(config)
    setattr(getattr(config, section), name, "other")
    with pytest.raises(InputError, match=f"^{key}='other' is none of {', '.join(CHOICES[key])}$"):
        check_values(config)


def test_the_choices_are_those_that_are_known_where_they_are_made() -> None:
    pytest.importorskip("megatron.core")
    from megatron_olmo_bridge.training.optimizer import _STYLES, decay_overrides
    from megatron_olmo_bridge.training.resolve import _RECOMPUTE

    assert CHOICES["schedule.decay"] == tuple(_STYLES)
    assert CHOICES["parallel.recompute"] == tuple(_RECOMPUTE)
    for choice in CHOICES["optimizer.decayed"]:
        decay_overrides(choice)


@pytest.mark.parametrize("value", [-1, "some", [2]])
def test_fields_of_the_provider(value: Any) -> None:
    with pytest.raises(InputError, match=r"provider\.init_method_std=.* must be at least 0"):
        check_values(run(provider={"init_method_std": value}))
