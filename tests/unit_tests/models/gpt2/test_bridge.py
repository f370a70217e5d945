"""GPT-2: its numbers, its first names, and that stock megatron-core has the same parameters."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.gpt2.bridge import GPT2Bridge
from megatron_olmo_bridge.models.gpt2.config import GPT2Config

CONFIG: dict[str, Any] = GPT2Bridge.sizes["gpt2-124m"]
TINY: dict[str, Any] = GPT2Bridge.sizes["gpt2-tiny"]


def test_every_value_is_read() -> None:
    assert GPT2Config.from_hf(CONFIG) == GPT2Config(
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        kv_channels=64,
        vocab_size=50257,
        max_position_embeddings=1024,
        layernorm_epsilon=1e-5,
        activation="gelu_new",
    )
    other = GPT2Config.from_hf(CONFIG | {"n_inner": 100, "activation_function": "gelu"})
    assert (other.ffn_hidden_size, other.activation) == (100, "gelu")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"n_embd": None}, InputError, "n_embd must be .* not null"),
        ({"n_head": 7}, InputError, "cannot be divided by 7"),
        ({"n_layer": 0}, InputError, "n_layer"),
        ({"activation_function": "relu"}, UnsupportedError, "relu"),
        ({"scale_attn_weights": False}, UnsupportedError, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, UnsupportedError, "inverse_layer_idx=True"),
        ({"add_cross_attention": True}, UnsupportedError, "add_cross_attention"),
    ],
)
def test_invalid_configs_are_refused(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        GPT2Config.from_hf(CONFIG | changes)


def test_the_first_checkpoints_have_no_prefix() -> None:
    bridge = GPT2Bridge(TINY)
    assert bridge.hf_names(["wte.weight", "lm_head.weight"]) == {
        "wte.weight": "transformer.wte.weight"
    }
    assert bridge.hf_names(["transformer.wte.weight"]) == {}
    # Another model's head is not taken for the embedding.
    assert bridge.hf_names(["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]) == {}
    reason = bridge.mapping_registry().resolve().reason_to_ignore
    assert reason("transformer.h.3.attn.bias") == "the causal mask, not a weight"
    assert reason("transformer.h.3.attn.c_attn.bias") is None


@pytest.mark.usefixtures("one_process")
def test_the_keys_are_those_of_megatron_cores_own_gpt2() -> None:
    """So that a checkpoint goes to and fro between this package and stock Megatron."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_olmo_bridge.live.shards import Finder, sharded_tensors
    from megatron_olmo_bridge.runtime.process_groups import ensure_process_groups

    config = TransformerConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=8,
        normalization="LayerNorm",
        params_dtype=torch.float32,
    )
    ensure_process_groups(config)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=1024,
        max_sequence_length=128,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )
    tensors = sharded_tensors(model.sharded_state_dict())
    finder = Finder.of(GPT2Bridge(TINY), tensors)
    found = [finder.shard(tensor).parameter.name for tensor in tensors]
    assert sorted(found) == sorted(finder.mapping.parameters)
