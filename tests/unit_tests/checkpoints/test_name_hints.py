"""Which family a checkpoint's tensor names belong to."""

from __future__ import annotations

import pytest

from megatron_olmo_bridge.checkpoints.name_hints import families_with
from megatron_olmo_bridge.models.families import published_sizes


@pytest.mark.parametrize("size", [name for name in published_sizes() if name.endswith("-tiny")])
def test_a_family_is_recognized_by_its_tensors(size: str) -> None:
    kind = published_sizes()[size]
    resolved = kind(kind.sizes[size]).mapping_registry().resolve()
    for names in (resolved.hf_shapes, resolved.parameters):
        assert kind.family in families_with(names)


def test_other_names_match_no_family() -> None:
    assert families_with(["model.something.weight"]) == []
