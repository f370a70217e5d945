"""What is refused before an optimizer's state is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.training.optimizer_state import check_loadable, check_parts

ONE: dict[Any, Any] = {"optimizer": {"param_groups": []}, "param_state_sharding_type": "any"}
"""The common state of a single optimizer."""


def optimizers(count: int) -> Any:
    return SimpleNamespace(chained_optimizers=[None] * count)


@pytest.mark.parametrize(
    ("saved", "count", "says"),
    [
        (
            {0: ONE, 1: ONE},
            1,
            r"with parallel\.ep above 1, .*can't be loaded with parallel\.ep=1\.",
        ),
        (ONE, 2, r"with parallel\.ep=1, .*can't be loaded with parallel\.ep above 1\."),
    ],
)
def test_expert_parallelism_is_neither_begun_nor_given_up(
    saved: dict[Any, Any], count: int, says: str
) -> None:
    with pytest.raises(InputError, match=f"^run/iter_0000004: .*{says}"):
        check_parts(Path("run/iter_0000004"), saved, optimizers(count))


@pytest.mark.parametrize(("saved", "count"), [(ONE, 1), ({0: ONE, 1: ONE}, 2)])
def test_as_many_optimizers_are_welcome(saved: dict[Any, Any], count: int) -> None:
    check_parts(Path("run/iter_0000004"), saved, optimizers(count))
    check_parts(Path("run/iter_0000004"), ONE, SimpleNamespace())


def test_a_layout_that_is_not_recorded_is_refused() -> None:
    """For example in a checkpoint that Megatron-LM saved."""
    with pytest.raises(InputError, match=r"iter_0000004 does not record\. .*init\.optimizer"):
        check_loadable(Path("run/iter_0000004"), None, [])
