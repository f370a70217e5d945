"""LayerNorm with and without weights, against transformers and torch."""

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.transformer import TransformerConfig
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from megatron_olmo_bridge.nn.layer_norm import LayerNorm, WeightlessLayerNorm


def config(**changes: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_olmos_is_that_of_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 32, dtype=dtype) * 3 + 1
    norm = WeightlessLayerNorm(config(), 32, eps=1e-5)
    assert not list(norm.parameters())
    assert torch.equal(norm(x), OlmoLayerNorm(32)(x))


def test_gpt2s_is_torchs_with_the_epsilon_given() -> None:
    x = torch.randn(5, 2, 32)
    norm, torchs = LayerNorm(config(), 32, eps=0.5), torch.nn.LayerNorm(32, eps=0.5)
    with torch.no_grad():
        for mine, theirs in zip(norm.parameters(), torchs.parameters(), strict=True):
            theirs.copy_(mine.uniform_(0.5, 1.5))
    assert torch.equal(norm(x), torchs(x))


def test_gradients_of_a_split_sequence_are_summed() -> None:
    """megatron-core does it for parameters that say so."""
    split = config(tensor_model_parallel_size=2, sequence_parallel=True)
    assert all(p.sequence_parallel for p in LayerNorm(split, 32).parameters())
    assert not any(p.sequence_parallel for p in LayerNorm(config(), 32).parameters())
