"""The registry: every parameter of every layer, or an error that names what is wrong."""

from collections.abc import Iterator

import pytest

from megatron_olmo_bridge.errors import MappingError
from megatron_olmo_bridge.mapping.mappings import DirectMapping, GatedMLPMapping
from megatron_olmo_bridge.mapping.placement import Placement, Region
from megatron_olmo_bridge.mapping.registry import (
    MegatronMappingRegistry,
    ResolvedMapping,
    bulleted,
)


class Overlapping(DirectMapping):
    """Writes its first row twice."""

    def placements(self) -> Iterator[Placement]:
        yield from super().placements()
        first_row = Region(0, 1, 0, 3)
        yield Placement(self.hf_param, first_row, self.megatron_param, first_row)


class Gapped(DirectMapping):
    """Leaves its last row out."""

    def placements(self) -> Iterator[Placement]:
        region = Region(0, self.hf_shape[0] - 1, 0, 3)
        yield Placement(self.hf_param, region, self.megatron_param, region)


class ReadsAnother(DirectMapping):
    """Takes its values from a tensor that it doesn't declare."""

    def placements(self) -> Iterator[Placement]:
        whole = Region.whole(self.hf_shape)
        yield Placement("elsewhere", whole, self.megatron_param, whole)


def small(num_layers: int = 2) -> ResolvedMapping:
    return MegatronMappingRegistry(
        DirectMapping(megatron_param="embedding", hf_param="embed", hf_shape=(4, 3), padded_rows=6),
        DirectMapping(megatron_param="layers.*.norm", hf_param="h.*.ln", hf_shape=(3,)),
        GatedMLPMapping(
            megatron_param="layers.*.fc1",
            gate="h.*.gate",
            up="h.*.up",
            ffn_hidden_size=5,
            hidden_size=3,
        ),
        DirectMapping(megatron_param="final", hf_param="norm", hf_shape=(3,)),
        num_layers=num_layers,
        ignored={"*.inv_freq": "computed", "head": "tied to embed"},
    ).resolve()


def test_layers_are_written_out_in_the_order_of_the_model() -> None:
    mapping = small()
    assert list(mapping.parameters) == [
        "embedding",
        "layers.0.norm",
        "layers.0.fc1",
        "layers.1.norm",
        "layers.1.fc1",
        "final",
    ]
    assert list(mapping.hf_shapes) == [
        "embed",
        "h.0.ln",
        "h.0.gate",
        "h.0.up",
        "h.1.ln",
        "h.1.gate",
        "h.1.up",
        "norm",
    ]
    fc1 = mapping.parameters["layers.1.fc1"]
    assert (fc1.pattern, fc1.index, fc1.shape) == ("layers.*.fc1", (1,), (10, 3))
    assert [p.hf_name for p in fc1.placements] == ["h.1.gate", "h.1.up"]
    assert fc1.chunks == (Region(0, 5, 0, 3), Region(5, 10, 0, 3))
    assert mapping.parameters["final"].index == ()


def test_placements_by_hf_name_leave_out_padding() -> None:
    mapping = small()
    by_hf_name = mapping.placements_by_hf_name
    assert list(by_hf_name) == list(mapping.hf_shapes)
    _, up = mapping.parameters["layers.1.fc1"].placements
    assert by_hf_name["h.1.up"] == [up]
    assert up == Placement("h.1.up", Region(0, 5, 0, 3), "layers.1.fc1", Region(5, 10, 0, 3))
    embedding, padding = mapping.parameters["embedding"].placements
    assert by_hf_name["embed"] == [embedding]
    assert (padding.hf_name, padding.megatron_region) == (None, Region(4, 6, 0, 3))


def test_a_table_may_have_no_layers() -> None:
    registry = MegatronMappingRegistry(
        DirectMapping(megatron_param="a", hf_param="b", hf_shape=(2,)), num_layers=7
    )
    assert list(registry.resolve().parameters) == ["a"]


def test_an_element_that_is_covered_twice_is_refused() -> None:
    registry = MegatronMappingRegistry(
        Overlapping(megatron_param="mine", hf_param="theirs", hf_shape=(4, 3)), num_layers=1
    )
    with pytest.raises(MappingError) as caught:
        registry.resolve()
    assert "- mine: block [0:1, 0:3] is covered twice" in str(caught.value)
    assert "- theirs: block [0:1, 0:3] is covered twice" in str(caught.value)


def test_elements_that_are_not_covered_are_refused_for_each_layer() -> None:
    registry = MegatronMappingRegistry(
        Gapped(megatron_param="l.*.mine", hf_param="h.*.theirs", hf_shape=(4, 3)), num_layers=2
    )
    with pytest.raises(MappingError) as caught:
        registry.resolve()
    for name in ("l.0.mine", "l.1.mine", "h.0.theirs", "h.1.theirs"):
        assert f"- {name}: 3 of 12 elements are not covered" in str(caught.value)


def test_a_tensor_that_is_read_nowhere_is_refused() -> None:
    registry = MegatronMappingRegistry(
        ReadsAnother(megatron_param="mine", hf_param="theirs", hf_shape=(4, 3)), num_layers=1
    )
    with pytest.raises(MappingError, match=r"theirs: 12 of 12 elements are not covered"):
        registry.resolve()


def test_a_tensor_used_by_two_parameters_is_refused() -> None:
    registry = MegatronMappingRegistry(
        DirectMapping(megatron_param="first", hf_param="shared", hf_shape=(2,)),
        DirectMapping(megatron_param="second", hf_param="shared", hf_shape=(2,)),
        num_layers=1,
    )
    with pytest.raises(MappingError, match=r"shared: block \[0:2, 0:1\] is covered twice"):
        registry.resolve()


def test_two_mappings_for_one_name_are_refused() -> None:
    registry = MegatronMappingRegistry(
        DirectMapping(megatron_param="l.*.a", hf_param="x.*", hf_shape=(2,)),
        DirectMapping(megatron_param="l.*.a", hf_param="y.*", hf_shape=(2,)),
        num_layers=2,
    )
    with pytest.raises(MappingError, match=r"two mappings write .* l\.0\.a"):
        registry.resolve()


def test_two_shapes_for_one_tensor_are_refused() -> None:
    registry = MegatronMappingRegistry(
        DirectMapping(megatron_param="a", hf_param="shared", hf_shape=(2,)),
        DirectMapping(megatron_param="b", hf_param="shared", hf_shape=(3,)),
        num_layers=1,
    )
    with pytest.raises(MappingError, match="two mappings give shared different shapes"):
        registry.resolve()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("h.3.rotary.inv_freq", "computed"),
        ("head", "tied to embed"),
        ("header", None),
        ("embed", None),
    ],
)
def test_ignored_names_have_a_reason(name: str, reason: str | None) -> None:
    assert small().reason_to_ignore(name) == reason


def test_check_hf_accepts_the_models_tensors_and_ignored_ones() -> None:
    mapping = small()
    mapping.check_hf({**mapping.hf_shapes, "h.0.inv_freq": (2,), "head": (4, 3)}, "folder")


def test_check_hf_names_everything_that_is_wrong_at_once() -> None:
    mapping = small()
    shapes = {**mapping.hf_shapes, "h.2.ln": (3,), "norm": (4,)}
    del shapes["h.1.up"]
    with pytest.raises(MappingError) as caught:
        mapping.check_hf(shapes, "the/folder")
    assert str(caught.value) == (
        "the/folder: its tensors are not those of its config.\n"
        "missing (1):\n  - h.1.up\n"
        "unexpected (1):\n  - h.2.ln\n"
        "wrong shape (1):\n  - norm has shape [4], the config asks for [3]"
    )


def test_a_model_far_larger_than_its_checkpoint_is_refused_before_it_is_written_out() -> None:
    rows = [
        DirectMapping(megatron_param="decoder.layers.*.a", hf_param="layers.*.a", hf_shape=(2,)),
        DirectMapping(
            megatron_param="decoder.layers.*.experts.*.b",
            hf_param="layers.*.experts.*.b",
            hf_shape=(2,),
        ),
    ]
    registry = MegatronMappingRegistry(*rows, num_layers=10**8, num_experts=10**9)
    with pytest.raises(
        MappingError,
        match="folder: has 47 tensors, too few for a model of 100,000,000 layers and 1,000,000,000 "
        "experts",
    ):
        registry.check_size(47, "folder")
    MegatronMappingRegistry(*rows, num_layers=100, num_experts=50).check_size(100, "folder")
    with pytest.raises(MappingError, match="of 100 layers and 51 experts"):
        MegatronMappingRegistry(*rows, num_layers=100, num_experts=51).check_size(100, "folder")


def test_a_long_list_ends_with_the_number_of_the_other_lines() -> None:
    assert bulleted(["a", "b"], 2) == "  - a\n  - b"
    assert bulleted(list("abcde"), 3).splitlines() == ["  - a", "  - b", "  - c", "  - and 2 more"]
