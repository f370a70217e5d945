"""OLMo-2's providers: the published numbers, the modules they build, and the way back to HF."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

import megatron_olmo_bridge
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge
from megatron_olmo_bridge.models.olmo2.config import Olmo2Config
from megatron_olmo_bridge.models.olmo2.provider import Olmo2ModelProvider

# layers, hidden, heads, key/value heads, ffn, parameters
PUBLISHED = {
    "1B": (16, 2048, 16, 16, 8192, 1_484_916_736),
    "7B": (32, 4096, 32, 32, 11008, 7_298_617_344),
    "13B": (40, 5120, 40, 40, 13824, 13_716_198_400),
    "32B": (64, 5120, 40, 8, 27648, 32_234_279_936),
}
TINY: dict[str, Any] = Olmo2Bridge.sizes["olmo2-tiny"] | {"num_hidden_layers": 2}


def provider_of(hf: dict[str, Any], **fields: Any) -> Olmo2ModelProvider:
    return Olmo2ModelProvider(**asdict(Olmo2Config.from_hf(hf)) | fields)


# ---------------------------------------------------------------------------- the published sizes


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_sized_provider_has_the_published_numbers(size: str) -> None:
    provider = getattr(megatron_olmo_bridge, f"Olmo2ModelProvider{size}")()
    layers, hidden, heads, groups, ffn, parameters = PUBLISHED[size]
    assert (provider.num_layers, provider.hidden_size) == (layers, hidden)
    assert (provider.num_attention_heads, provider.num_query_groups) == (heads, groups)
    assert (provider.ffn_hidden_size, provider.kv_channels) == (ffn, 128)
    assert (provider.vocab_size, provider.padded_vocab_size) == (100352, 100352)
    assert provider.max_position_embeddings == 4096
    assert (provider.layernorm_epsilon, provider.rotary_base) == (1e-6, 500000.0)
    assert provider.share_embeddings_and_output_weights is False
    assert (provider.hidden_dropout, provider.attention_dropout) == (0.0, 0.0)
    provider.finalize()

    config = Olmo2Bridge.hf_config_of_record(vars(provider), None)
    shapes = Olmo2Bridge(config).mapping_registry().resolve().hf_shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_sized_provider_equals_one_made_from_its_config(size: str) -> None:
    sized = getattr(megatron_olmo_bridge, f"Olmo2ModelProvider{size}")(params_dtype=torch.bfloat16)
    same = provider_of(Olmo2Bridge.sizes[f"olmo2-{size.lower()}"], params_dtype=torch.bfloat16)
    for name in vars(same):
        if not (name.startswith("_") or name.endswith("init_method")):
            assert getattr(sized, name) == getattr(same, name), name


def test_a_sized_provider_takes_every_field() -> None:
    provider = megatron_olmo_bridge.Olmo2ModelProvider7B(
        num_layers=2, tensor_model_parallel_size=2, params_dtype=torch.bfloat16
    )
    assert (provider.num_layers, provider.hidden_size) == (2, 4096)
    assert provider.tensor_model_parallel_size == 2
    assert provider.bf16
    with pytest.raises(InputError, match="no field 'num_layer'; did you mean 'num_layers'"):
        megatron_olmo_bridge.Olmo2ModelProvider7B(num_layer=2)


def test_a_sized_provider_can_be_copied_and_pickled() -> None:
    provider = megatron_olmo_bridge.Olmo2ModelProvider1B(num_layers=3)
    for other in (copy.deepcopy(provider), pickle.loads(pickle.dumps(provider))):
        assert type(other) is type(provider)
        assert (other.num_layers, other.ffn_hidden_size) == (3, 8192)
        other.finalize()


# ---------------------------------------------------------------------------------- what is built


def norms_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        name: m
        for name, m in model.named_modules()
        if name.rpartition(".")[2].endswith("norm") and list(m.parameters())
    }


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("eps", [1e-6, 3e-5])
def test_every_norm_has_the_configs_epsilon(eps: float) -> None:
    # Told apart by looking: logits of a model with another epsilon are hardly any different.
    provider = provider_of(TINY | {"rms_norm_eps": eps})
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    expected = {
        f"decoder.layers.{i}.{name}"
        for i in range(2)
        for name in (
            "self_attention.q_layernorm",
            "self_attention.k_layernorm",
            "self_attention.linear_proj.post_layernorm",
            "mlp.linear_fc2.post_layernorm",
        )
    }
    found = norms_of(model)
    assert found.keys() == expected | {"decoder.final_layernorm"}
    assert provider.layernorm_epsilon == eps
    assert {name: module.eps for name, module in found.items()} == dict.fromkeys(found, eps)


@pytest.mark.usefixtures("one_process")
def test_the_parameters_are_those_of_the_mapping() -> None:
    (model,) = provider_of(TINY).provide_distributed_model(wrap_with_ddp=False)
    mapping = Olmo2Bridge(TINY).mapping_registry().resolve()
    expected = {name: p.shape for name, p in mapping.parameters.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected


@pytest.mark.usefixtures("one_process")
def test_a_config_without_the_qk_norm_is_not_olmo2s() -> None:
    provider = provider_of(TINY, qk_layernorm=False)
    with pytest.raises(InputError, match=r"^OLMo-2 normalises queries and keys"):
        provider.provide_distributed_model()


def test_overrides_take_precedence_over_the_config() -> None:
    provider = provider_of(TINY, num_layers=3, rotary_base=1e4)
    assert (provider.num_layers, provider.rotary_base, provider.hidden_size) == (3, 1e4, 128)


# ------------------------------------------------------------------------- and back to HF's config

THETA = 250000.0
WITHOUT_ROPE = {k: v for k, v in TINY.items() if k not in ("rope_theta", "rope_scaling")}
DEFAULT = {"rope_type": "default", "rope_theta": THETA}
ROPES: dict[str, dict[str, Any]] = {
    "legacy": {"rope_theta": THETA, "rope_scaling": None},
    "flat": {"rope_parameters": DEFAULT},
    "nested by layer type": {"rope_parameters": {"full_attention": DEFAULT}},
}
CHANGES: dict[str, dict[str, Any]] = {
    "as published": {},
    "tied": {"tie_word_embeddings": True},
    "no grouped queries": {"num_key_value_heads": 8},
    "one key/value head": {"num_key_value_heads": 1},
    "head_dim apart from hidden_size": {"head_dim": 24},
    "other epsilon and positions": {"rms_norm_eps": 1e-5, "max_position_embeddings": 65536},
    "odd vocabulary": {"vocab_size": 1003},
}


@pytest.mark.parametrize("rope", ROPES)
def test_theta_of_any_spelling(rope: str) -> None:
    assert provider_of(WITHOUT_ROPE | ROPES[rope]).rotary_base == THETA


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rope", ROPES)
def test_back_to_the_config_without_loss(rope: str, change: str) -> None:
    original = Olmo2Config.from_hf(WITHOUT_ROPE | ROPES[rope] | CHANGES[change])
    provider = Olmo2ModelProvider(**asdict(original), make_vocab_size_divisible_by=128)
    provider.finalize()
    back = Olmo2Bridge.hf_config_of_record(vars(provider), original.vocab_size)
    assert Olmo2Config.from_hf(back) == original
    assert back["architectures"] == ["Olmo2ForCausalLM"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_back_to_the_config_with_the_dtype(dtype: str) -> None:
    provider = provider_of(TINY, params_dtype=getattr(torch, dtype))
    assert Olmo2Bridge.hf_config_of_record(vars(provider), None)["torch_dtype"] == dtype


def test_transformers_reads_the_config_as_the_same_model() -> None:
    transformers = pytest.importorskip("transformers")
    provider = provider_of(WITHOUT_ROPE | ROPES["flat"] | {"num_key_value_heads": 2})
    back = Olmo2Bridge.hf_config_of_record(vars(provider), None)
    theirs = transformers.Olmo2Config(**back).to_dict()
    assert Olmo2Config.from_hf(theirs) == Olmo2Config.from_hf(back)
    assert theirs["rope_parameters"]["rope_theta"] == THETA
