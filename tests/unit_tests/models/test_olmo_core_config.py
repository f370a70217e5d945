"""OLMo-core's config of a model, and the names of its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.models.families import bridge_for, published_sizes
from megatron_olmo_bridge.models.olmo_core_config import hf_config
from megatron_olmo_bridge.models.olmo_core_export import olmo_core_config
from megatron_olmo_bridge.models.olmo_core_names import StoredAs, stored_as

CONVERTED = ("olmo2-7b", "olmo2-32b", "olmo3-7b", "olmo3-tiny", "olmoe-1b-7b", "olmoe-tiny")


def bridge(name: str) -> Any:
    return bridge_for(published_sizes()[name].sizes[name], name)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_config_survives_the_way_to_olmo_core_and_back(name: str) -> None:
    model = bridge(name)
    back = bridge_for(hf_config(olmo_core_config(model)), "back")
    assert back.family == model.family
    assert back.config_values == model.config_values
    assert back.hf_shapes == model.hf_shapes
    for key in ("eos_token_id", "pad_token_id"):
        assert back.hf_config[key] == model.hf_config[key]


def test_attention_has_another_name_before_version_3() -> None:
    config = olmo_core_config(bridge("olmo2-7b"))
    block = config["model"]["block"]
    block["attention"] = block.pop("sequence_mixer")
    assert hf_config(config)["num_attention_heads"] == 32


def test_windows_follow_pattern_and_forced_layers() -> None:
    config = olmo_core_config(bridge("olmo3-tiny"))
    config["model"].pop("block_overrides")
    windows = config["model"]["block"]["sequence_mixer"]["sliding_window"]
    windows |= {"pattern": [8, -1]}
    types = hf_config(config)["layer_types"]
    assert types == ["sliding_attention", "full_attention"] * 2
    windows["force_full_attention_on_first_layer"] = True
    types = hf_config(config)["layer_types"]
    assert types == ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    windows["pattern"] = [8, 16]
    with pytest.raises(UnsupportedError, match=r"windows of several sizes: \[8, 16\]"):
        hf_config(config)


def test_yarn_in_layers_with_a_window_is_refused() -> None:
    config = olmo_core_config(bridge("olmo3-tiny"))
    scaled = next(iter(config["model"].pop("block_overrides").values()))
    config["model"]["block"] = scaled
    with pytest.raises(UnsupportedError, match="YaRN in layers with a window"):
        hf_config(config)


def test_a_config_without_a_length_names_the_option() -> None:
    config = olmo_core_config(bridge("olmo2-7b"))
    del config["train_module"]
    with pytest.raises(InputError, match="neither train_module"):
        hf_config(config)
    assert hf_config(config, 8192)["max_position_embeddings"] == 8192


@pytest.mark.parametrize("name", ["gpt2-tiny", "olmo-tiny"])
def test_a_family_without_olmo_core_model_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="OLMo-core has no"):
        olmo_core_config(bridge(name))


@pytest.mark.parametrize(
    ("hf_name", "hf_shape", "name"),
    [("gate_proj", (96, 128), "w1"), ("down_proj", (128, 96), "w2"), ("up_proj", (96, 128), "w3")],
)
@pytest.mark.parametrize("dropless", [True, False])
def test_experts_are_stacked_and_some_are_transposed(
    hf_name: str, hf_shape: tuple[int, int], name: str, dropless: bool
) -> None:
    """As allocated in ``olmo_core/nn/moe/mlp.py``: [experts * ffn, hidden] without dropping."""
    rows, columns = (96, 128) if dropless or name == "w2" else (128, 96)
    stored = stored_as(
        f"model.layers.1.mlp.experts.2.{hf_name}.weight", hf_shape, bridge("olmoe-tiny"), dropless
    )
    assert stored == StoredAs(
        f"blocks.1.feed_forward_moe.experts.mlp.{name}",
        (8 * rows, columns),
        Region(2 * rows, 3 * rows, 0, columns),
        transposed=hf_shape != (rows, columns),
    )


def test_the_router_is_flat() -> None:
    router = "model.layers.1.mlp.gate.weight"
    assert stored_as(router, (8, 128), bridge("olmoe-tiny"), True) == StoredAs(
        "blocks.1.feed_forward_moe.router.weight", (1024,)
    )


def test_one_name_is_that_of_the_norm_before_or_after() -> None:
    norm = "model.layers.0.post_attention_layernorm.weight"
    names = {m: stored_as(norm, (8,), bridge(m), True).name for m in ("olmo2-7b", "olmoe-1b-7b")}
    assert names == {
        "olmo2-7b": "blocks.0.attention_norm.weight",
        "olmoe-1b-7b": "blocks.0.feed_forward_norm.weight",
    }
