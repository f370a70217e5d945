"""Each kind of mapping, against the same arrangement written in torch."""

import itertools

import pytest
import torch

from megatron_olmo_bridge.mapping.mappings import (
    DirectMapping,
    FusedQKVMapping,
    GatedMLPMapping,
    Mapping,
    QKVMapping,
    TransposedMapping,
)
from megatron_olmo_bridge.mapping.placement import Region, uncovered


def apply(mapping: Mapping, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the placements say, element by element."""
    out = torch.full(mapping.megatron_shape, torch.nan)
    matrix = out.view(mapping.megatron_shape[0], -1)
    for p in mapping.placements():
        t, s = p.megatron_region, p.hf_region
        assert p.megatron_name == mapping.megatron_param
        if p.hf_name is None:
            matrix[t.top : t.bottom, t.left : t.right] = 0
        else:
            source = tensors[p.hf_name].view(tensors[p.hf_name].shape[0], -1)
            block = source[s.top : s.bottom, s.left : s.right]
            matrix[t.top : t.bottom, t.left : t.right] = block.T if p.transposed else block
    return out


def random_tensors(mapping: Mapping) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in mapping.hf_shapes().items()}


@pytest.mark.parametrize(
    ("groups", "per_group", "head_dim", "hidden"),
    itertools.product((1, 2, 5), (1, 3), (1, 4), (1, 7)),
)
def test_qkv_interleaves_by_query_group(
    groups: int, per_group: int, head_dim: int, hidden: int
) -> None:
    heads = groups * per_group
    mapping = QKVMapping(
        megatron_param="qkv",
        q="q",
        k="k",
        v="v",
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        hidden_size=hidden,
    )
    tensors = random_tensors(mapping)
    q, k, v = (
        tensors[name].view(groups, width * head_dim, hidden)
        for name, width in (("q", per_group), ("k", 1), ("v", 1))
    )
    expected = torch.cat([q, k, v], dim=1).reshape(-1, hidden)
    assert mapping.megatron_shape == (groups * (per_group + 2) * head_dim, hidden)
    assert torch.equal(apply(mapping, tensors), expected)


@pytest.mark.parametrize(("heads", "head_dim"), itertools.product((1, 2, 5), (1, 4)))
def test_fused_qkv_is_interleaved_and_transposed(heads: int, head_dim: int) -> None:
    width = heads * head_dim
    mapping = FusedQKVMapping(
        megatron_param="qkv",
        hf_param="c_attn",
        num_attention_heads=heads,
        kv_channels=head_dim,
        hidden_size=7,
    )
    tensors = {"c_attn": torch.randn(7, 3 * width)}
    assert mapping.hf_shapes() == {"c_attn": (7, 3 * width)}
    q, k, v = (part.T.view(heads, head_dim, 7) for part in tensors["c_attn"].split(width, dim=1))
    expected = torch.cat([q, k, v], dim=1).reshape(-1, 7)
    assert torch.equal(apply(mapping, tensors), expected)

    bias = FusedQKVMapping(
        megatron_param="qkv",
        hf_param="c_attn",
        num_attention_heads=heads,
        kv_channels=head_dim,
        hidden_size=None,
    )
    tensors = {"c_attn": torch.randn(3 * width)}
    assert bias.hf_shapes() == {"c_attn": (3 * width,)}
    expected = tensors["c_attn"].view(3, heads, head_dim).transpose(0, 1).reshape(-1)
    assert torch.equal(apply(bias, tensors), expected)


def test_a_transposed_mapping_swaps_rows_and_columns() -> None:
    mapping = TransposedMapping(megatron_param="fc1", hf_param="c_fc", hf_shape=(5, 3))
    tensors = random_tensors(mapping)
    assert mapping.megatron_shape == (3, 5)
    assert torch.equal(apply(mapping, tensors), tensors["c_fc"].T)


def test_a_gated_mlp_has_gate_above_up() -> None:
    mapping = GatedMLPMapping(
        megatron_param="fc1", gate="gate", up="up", ffn_hidden_size=6, hidden_size=5
    )
    tensors = random_tensors(mapping)
    expected = torch.cat([tensors["gate"], tensors["up"]])
    assert torch.equal(apply(mapping, tensors), expected)


def test_gate_and_up_are_separate_chunks() -> None:
    # As GPTModel.sharded_state_dict() cuts linear_fc1: at row 0 and at row ffn.
    mapping = GatedMLPMapping(
        megatron_param="fc1", gate="gate", up="up", ffn_hidden_size=6, hidden_size=5
    )
    assert mapping.chunks() == [Region(0, 6, 0, 5), Region(6, 12, 0, 5)]


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_a_direct_mapping_changes_nothing(shape: tuple[int, ...]) -> None:
    mapping = DirectMapping(megatron_param="a", hf_param="b", hf_shape=shape)
    tensors = random_tensors(mapping)
    assert mapping.megatron_shape == shape
    assert torch.equal(apply(mapping, tensors), tensors["b"])
    assert mapping.chunks() == [Region.whole(shape)]


def test_padding_is_rows_of_zeros_at_the_end() -> None:
    mapping = DirectMapping(megatron_param="a", hf_param="b", hf_shape=(5, 3), padded_rows=8)
    tensors = random_tensors(mapping)
    expected = torch.cat([tensors["b"], torch.zeros(3, 3)])
    assert mapping.megatron_shape == (8, 3)
    assert mapping.hf_shapes() == {"b": (5, 3)}
    assert torch.equal(apply(mapping, tensors), expected)


def test_no_padding_where_the_rows_suffice() -> None:
    mapping = DirectMapping(megatron_param="a", hf_param="b", hf_shape=(5, 3), padded_rows=5)
    assert [p.hf_name for p in mapping.placements()] == ["b"]


@pytest.mark.parametrize(
    "mapping",
    [
        QKVMapping(
            megatron_param="qkv",
            q="q",
            k="k",
            v="v",
            num_attention_heads=6,
            num_query_groups=2,
            kv_channels=4,
            hidden_size=24,
        ),
        GatedMLPMapping(
            megatron_param="fc1", gate="gate", up="up", ffn_hidden_size=6, hidden_size=5
        ),
        DirectMapping(megatron_param="a", hf_param="b", hf_shape=(5, 3), padded_rows=8),
    ],
)
def test_all_elements_of_both_sides_are_covered_once(mapping: Mapping) -> None:
    placements = list(mapping.placements())
    assert all(p.hf_region.rows == p.megatron_region.rows for p in placements)
    assert all(p.hf_region.columns == p.megatron_region.columns for p in placements)
    assert uncovered(mapping.megatron_shape, (p.megatron_region for p in placements)) is None
    assert uncovered(mapping.megatron_shape, mapping.chunks()) is None
    for name, shape in mapping.hf_shapes().items():
        assert uncovered(shape, (p.hf_region for p in placements if p.hf_name == name)) is None


def test_the_wildcard_becomes_the_layer_in_every_name() -> None:
    mapping = QKVMapping(
        megatron_param="d.*.qkv",
        q="m.*.q",
        k="m.*.k",
        v="m.*.v",
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=4,
        hidden_size=24,
    ).at((11,))
    assert mapping == QKVMapping(
        megatron_param="d.11.qkv",
        q="m.11.q",
        k="m.11.k",
        v="m.11.v",
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=4,
        hidden_size=24,
    )


def test_two_wildcards_are_layer_and_expert() -> None:
    mapping = GatedMLPMapping(
        megatron_param="d.*.e.*.fc1",
        gate="m.*.e.*.gate",
        up="m.*.e.*.up",
        ffn_hidden_size=6,
        hidden_size=5,
    ).at((3, 7))
    assert mapping == GatedMLPMapping(
        megatron_param="d.3.e.7.fc1",
        gate="m.3.e.7.gate",
        up="m.3.e.7.up",
        ffn_hidden_size=6,
        hidden_size=5,
    )
