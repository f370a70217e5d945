"""OLMo-2's table: what stands where, and how large the published models are."""

import math
import re
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.mapping.registry import ResolvedMapping
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge

PUBLISHED = {
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
}
# What a model built by stock megatron-core with the OLMo-2 layer spec calls its parameters.
LAYER = {
    "self_attention.linear_qkv.weight": {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    },
    "self_attention.q_layernorm.weight": {"self_attn.q_norm.weight"},
    "self_attention.k_layernorm.weight": {"self_attn.k_norm.weight"},
    "self_attention.linear_proj.weight": {"self_attn.o_proj.weight"},
    "self_attention.linear_proj.post_layernorm.weight": {"post_attention_layernorm.weight"},
    "mlp.linear_fc1.weight": {"mlp.gate_proj.weight", "mlp.up_proj.weight"},
    "mlp.linear_fc2.weight": {"mlp.down_proj.weight"},
    "mlp.linear_fc2.post_layernorm.weight": {"post_feedforward_layernorm.weight"},
}
OUTSIDE = {
    "embedding.word_embeddings.weight": {"model.embed_tokens.weight"},
    "decoder.final_layernorm.weight": {"model.norm.weight"},
    "output_layer.weight": {"lm_head.weight"},
}


def bridge(size: str = "olmo2-tiny", **changes: Any) -> Olmo2Bridge:
    return Olmo2Bridge(Olmo2Bridge.sizes[size] | changes)


def sources(mapping: ResolvedMapping) -> dict[str, set[str | None]]:
    return {n: {x.hf_name for x in p.placements} for n, p in mapping.parameters.items()}


@pytest.mark.parametrize(("size", "count"), PUBLISHED.items())
def test_the_number_of_parameters_is_the_published_one(size: str, count: int) -> None:
    mapping = bridge(size).mapping_registry().resolve()
    assert sum(math.prod(shape) for shape in mapping.hf_shapes.values()) == count
    assert sum(math.prod(p.shape) for p in mapping.parameters.values()) == count


def test_every_parameter_and_what_it_is_made_of() -> None:
    mapping = bridge(num_hidden_layers=2).mapping_registry().resolve()
    assert sources(mapping) == OUTSIDE | {
        f"decoder.layers.{i}.{name}": {f"model.layers.{i}.{hf}" for hf in made_of}
        for i in range(2)
        for name, made_of in LAYER.items()
    }


def test_post_norms_are_never_stored_as_pre_norms() -> None:
    # These names exist in other models' layer specs: there the norm stands before the linear.
    mapping = bridge().mapping_registry().resolve()
    assert not [n for n in mapping.parameters if "layer_norm_weight" in n]
    assert not [n for n in mapping.parameters if "input_layernorm" in n or "pre_mlp" in n]
    placed = {
        p.megatron_name
        for hf_name, placements in mapping.placements_by_hf_name.items()
        if "post_" in hf_name
        for p in placements
    }
    layer = r"decoder\.layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)"
    assert all(re.fullmatch(layer + r"\.post_layernorm\.weight", name) for name in placed)
    assert len(placed) == 2 * 4


def test_the_state_dict_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for head_dim in (None, 24):
        config = Olmo2Bridge.sizes["olmo2-tiny"] | ({"head_dim": head_dim} if head_dim else {})
        with torch.device("meta"):
            model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**config))
        expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        assert Olmo2Bridge(config).mapping_registry().resolve().hf_shapes == expected


def test_qk_norms_have_the_full_projection_width() -> None:
    parameters = bridge("olmo2-32b").mapping_registry().resolve().parameters
    attention = "decoder.layers.63.self_attention"
    assert parameters[f"{attention}.q_layernorm.weight"].shape == (40 * 128,)
    assert parameters[f"{attention}.k_layernorm.weight"].shape == (8 * 128,)


def test_a_padded_vocabulary_is_zeros_in_embedding_and_head() -> None:
    mapping = bridge(vocab_size=1000).mapping_registry(1024).resolve()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert mapping.parameters[name].shape == (1024, 128)
        zeros = [p for p in mapping.parameters[name].placements if p.hf_name is None]
        assert [(z.megatron_region.top, z.megatron_region.bottom) for z in zeros] == [(1000, 1024)]
    assert mapping.hf_shapes["lm_head.weight"] == (1000, 128)


def test_tied_embeddings_have_no_head() -> None:
    mapping = bridge(tie_word_embeddings=True).mapping_registry().resolve()
    assert "output_layer.weight" not in mapping.parameters
    assert "lm_head.weight" not in mapping.hf_shapes
    assert mapping.reason_to_ignore("lm_head.weight") == "tied to model.embed_tokens.weight"
    assert bridge().mapping_registry().resolve().reason_to_ignore("lm_head.weight") is None


def test_computed_buffers_are_ignored() -> None:
    reason = bridge().mapping_registry().resolve().reason_to_ignore
    assert reason("model.layers.0.self_attn.rotary_emb.inv_freq") is not None
    assert reason("model.layers.0.self_attn.q_proj.bias") is None


@pytest.mark.parametrize("size", Olmo2Bridge.sizes)
def test_a_published_size_is_recognised(size: str) -> None:
    assert bridge(size).size_name() == size


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 31}, {"vocab_size": 100_353}, {"num_key_value_heads": 8}]
)
def test_another_shape_has_no_size_name(changes: dict[str, Any]) -> None:
    assert bridge("olmo2-7b", **changes).size_name() is None


def test_extra_states_are_those_of_linears_and_norms() -> None:
    attention, mlp = "decoder.layers.*.self_attention", "decoder.layers.*.mlp"
    modules = [
        f"{attention}.linear_qkv",
        f"{attention}.linear_proj",
        f"{attention}.linear_proj.post_layernorm",
        f"{mlp}.linear_fc1",
        f"{mlp}.linear_fc2",
        f"{mlp}.linear_fc2.post_layernorm",
        "decoder.final_layernorm",
    ]
    assert list(bridge().extra_state_patterns()) == [f"{m}._extra_state" for m in modules]


@pytest.mark.parametrize("padded", [1000, 1024, 1003, 1536])
def test_the_provider_fields_make_a_provider_of_the_same_model(padded: int) -> None:
    provider = pytest.importorskip("megatron_olmo_bridge.models.olmo2.provider")
    fields = bridge(vocab_size=1000, num_hidden_layers=3).run_config_model(padded, "bfloat16")
    name = fields.pop("_target_").rpartition(".")
    assert name[0] == provider.__name__
    dtype = fields.pop("params_dtype")
    assert dtype == {"_target_": "torch.bfloat16", "_call_": False}
    made = getattr(provider, name[2])(**fields, params_dtype=torch.bfloat16)
    assert (made.vocab_size, made.padded_vocab_size) == (1000, padded)
    assert (made.num_layers, made.hidden_size, made.num_query_groups) == (3, 128, 4)
    assert (made.rotary_base, made.layernorm_epsilon) == (500000.0, 1e-6)
    assert made.bf16
    assert not made.fp16


def test_a_config_from_megatrons_args_is_of_the_same_model() -> None:
    first = bridge("olmo2-32b", vocab_size=100_300)
    args = first.megatron_args(100_352, "bfloat16")
    assert (
        Olmo2Bridge(Olmo2Bridge.hf_config_of_record(args, None)).config_values
        == first.config_values
    )


def test_the_flags_name_the_padded_model() -> None:
    flags = bridge().megatron_lm_flags("bfloat16")
    assert "--bf16" in flags
    assert "--use-checkpoint-args" in flags
