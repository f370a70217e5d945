"""What OLMoE's provider has that its config.json doesn't say."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_olmo_bridge.models.families import bridge_for, published_sizes


@pytest.mark.parametrize(("size", "z_loss"), [("olmoe-tiny", 0.001), ("flex-olmo-tiny", None)])
def test_the_router_is_trained_with_the_published_losses(size: str, z_loss: float | None) -> None:
    provider = bridge_for(published_sizes()[size].sizes[size], size).provider()
    assert provider.moe_aux_loss_coeff == 0.01
    assert provider.moe_z_loss_coeff == z_loss
