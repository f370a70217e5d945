"""What a process holds of a live model, by the model's own account."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from megatron.core.utils import unwrap_model

from megatron_olmo_bridge.errors import InputError, MappingError
from megatron_olmo_bridge.live.shards import LiveModel, Shard
from megatron_olmo_bridge.mapping.placement import Region, uncovered
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge

Build = Callable[..., list[torch.nn.Module]]
HFFactory = Callable[..., Path]


def regions_by_name(shards: tuple[Shard, ...]) -> dict[str, list[Region]]:
    found: dict[str, list[Region]] = {}
    for shard in shards:
        found.setdefault(shard.parameter.name, []).append(shard.region)
    return found


def bridge_of(reference: SimpleNamespace, **changes: Any) -> Olmo2Bridge:
    return Olmo2Bridge(reference.config | changes)


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wrapped": {"wrap_with_ddp": True},
    "half precision, wrapped": {"wrap_with_ddp": True, "params_dtype": torch.bfloat16},
    # megatron-core then gives each layer keys of its own.
    "layers apart": {"hetereogenous_dist_checkpoint": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_holds_every_element_of_every_parameter_once(
    layout: str, build: Build, make_hf: HFFactory, reference: SimpleNamespace
) -> None:
    live = LiveModel.of(build(make_hf(), **LAYOUTS[layout]), bridge_of(reference))
    found = regions_by_name(live.shards)
    assert found.keys() == live.mapping.parameters.keys()
    for name, regions in found.items():
        assert uncovered(live.mapping.parameters[name].shape, regions) is None, name
    assert all(shard.is_main for shard in live.shards)


def test_shards_are_the_models_own_memory(
    build: Build, make_hf: HFFactory, reference: SimpleNamespace
) -> None:
    hf = make_hf()
    chunks = build(hf)
    tensors = reference.state_dict(reference.config, torch.float32, seed=3)
    expected = reference.parameters(tensors, reference.config)
    for shard in LiveModel.of(chunks, bridge_of(reference)).shards:
        whole = expected[shard.parameter.name]
        rows = whole[shard.region.top : shard.region.bottom]
        assert shard.matrix.shape == (shard.region.rows, shard.region.columns)
        shard.matrix.copy_(rows.reshape(shard.matrix.shape))
    filled = dict(chunks[0].named_parameters())
    assert filled.keys() == expected.keys()
    assert all(torch.equal(filled[name], expected[name]) for name in expected)


def test_gate_and_up_are_two_shards_of_one_parameter(
    build: Build, make_hf: HFFactory, reference: SimpleNamespace
) -> None:
    live = LiveModel.of(build(make_hf()), bridge_of(reference))
    found = regions_by_name(live.shards)
    assert found["decoder.layers.2.mlp.linear_fc1.weight"] == [
        Region(0, 50, 0, 36),
        Region(50, 100, 0, 36),
    ]
    assert found["decoder.layers.2.self_attention.linear_proj.weight"] == [Region(0, 36, 0, 36)]
    assert found["decoder.final_layernorm.weight"] == [Region(0, 36, 0, 1)]


def test_the_padded_vocabulary_is_known_from_the_model(
    build: Build, make_hf: HFFactory, reference: SimpleNamespace
) -> None:
    live = LiveModel.of(build(make_hf(), make_vocab_size_divisible_by=64), bridge_of(reference))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert live.mapping.parameters[name].shape == (128, 36)
    assert live.mapping.hf_shapes["lm_head.weight"] == (101, 36)


def test_a_tied_head_is_not_held_twice(
    build: Build, make_hf: HFFactory, reference: SimpleNamespace
) -> None:
    chunks = build(make_hf(tie_word_embeddings=True))
    live = LiveModel.of(chunks, bridge_of(reference, tie_word_embeddings=True))
    assert "output_layer.weight" not in regions_by_name(live.shards)


# ----------------------------------------------------------------------------------- what isn't so


def test_no_model_is_refused(reference: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="the list of chunks is empty"):
        LiveModel.of([], bridge_of(reference))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 60},
         "decoder.layers.0.mlp.linear_fc1.weight has shape [100, 36] in the model, the config asks "
         "for [120, 36]"),
        ({"vocab_size": 102},
         "embedding.word_embeddings.weight has shape [101, 36] in the model, the config asks for "
         "[102, 36]"),
        ({"num_hidden_layers": 2}, "num_layers is 3 in the model, the config asks for 2"),
        ({"num_key_value_heads": 6}, "num_query_groups is 2 in the model, the config asks for 6"),
        ({"head_dim": 12}, "kv_channels is 6 in the model, the config asks for 12"),
        ({"tie_word_embeddings": True},
         "share_embeddings_and_output_weights is False in the model, the checkpoint asks for True"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_name(
    changes: dict[str, Any],
    message: str,
    build: Build,
    make_hf: HFFactory,
    reference: SimpleNamespace,
) -> None:
    chunks = build(make_hf())
    with pytest.raises(MappingError) as caught:
        LiveModel.of(chunks, bridge_of(reference, **changes))
    assert str(caught.value) == message


def test_a_parameter_that_the_mapping_does_not_know_is_refused(
    build: Build, make_hf: HFFactory, reference: SimpleNamespace
) -> None:
    chunks = build(make_hf())
    chunks[0].decoder.final_layernorm.bias = torch.nn.Parameter(torch.zeros(36))
    with pytest.raises(MappingError, match=r"a tensor decoder\.final_layernorm\.bias that the"):
        LiveModel.of(chunks, bridge_of(reference))


def test_a_parameter_that_no_checkpoint_would_hold_is_refused(
    build: Build, make_hf: HFFactory, reference: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = build(make_hf(), wrap_with_ddp=True)
    (model,) = unwrap_model(chunks)
    state = model.sharded_state_dict()
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    monkeypatch.setattr(
        model, "sharded_state_dict", lambda: {n: v for n, v in state.items() if n != name}
    )
    with pytest.raises(MappingError) as caught:
        LiveModel.of(chunks, bridge_of(reference))
    assert (
        str(caught.value)
        == f"{name} is a parameter of the model, but not in its sharded_state_dict()"
    )
