"""OlmoeConfig.from_hf: experts."""

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.olmoe.bridge import OlmoeBridge, OlmoeConfig

CONFIG: dict[str, Any] = OlmoeBridge.sizes["olmoe-1b-7b"]


def test_reads_the_experts() -> None:
    found = OlmoeConfig.from_hf(CONFIG | {"clip_qkv": 8.0})
    assert (found.num_moe_experts, found.moe_router_topk) == (64, 8)
    assert found.ffn_hidden_size == 1024
    assert found.clip_qkv == 8.0
    assert found.moe_router_pre_softmax  # the weights of the eight don't sum to one
    assert not OlmoeConfig.from_hf(CONFIG | {"norm_topk_prob": True}).moe_router_pre_softmax


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 65}, "65 of 64 experts"),
    ],
)
def test_invalid_configs_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        OlmoeConfig.from_hf(CONFIG | changes)
