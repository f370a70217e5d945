"""``torch_dist`` folders: those that torch saved are read, those that we describe torch reads."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_olmo_bridge.errors import FormatError, MappingError, UnsafePickleError
from megatron_olmo_bridge.formats.tensors import TensorView
from megatron_olmo_bridge.formats.torch_archive import object_archive
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder, read_format, stacked_key
from megatron_olmo_bridge.mapping.registry import ResolvedMapping
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge
from megatron_olmo_bridge.storage.transfer import Transfer

Tensors = dict[str, torch.Tensor]
Save = Callable[..., Path]


def values(view: TensorView) -> torch.Tensor:
    with Transfer() as transfer:
        data = b"".join(bytes(block) for _, _, block in transfer.blocks(view))
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, view.dtype)).view(view.shape)


@pytest.fixture
def parameters(reference: SimpleNamespace) -> Tensors:
    tensors = reference.state_dict(reference.config, torch.bfloat16, 3)
    return reference.parameters(tensors, reference.config)


@pytest.fixture
def mapping(reference: SimpleNamespace) -> ResolvedMapping:
    return Olmo2Bridge(reference.config).mapping_registry().resolve()


def split_gated(parameters: Tensors) -> Tensors:
    """linear_fc1 as two keys, as megatron-core saves it with ``singleton_local_shards``."""
    out = {}
    for name, tensor in parameters.items():
        if "linear_fc1" in name:
            out |= {f"{name}_w": tensor.chunk(2)[0], f"{name}_v": tensor.chunk(2)[1]}
        else:
            out[name] = tensor
    return out


LAYOUTS: dict[str, Callable[[Tensors, SimpleNamespace], Tensors]] = {
    "stacked": lambda p, reference: reference.stacked(p, reference.config),
    "per layer": lambda p, _: p,
    "per layer, gate and up apart": lambda p, _: split_gated(p),
}


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_any_chunks_gives_the_parameters(
    layout: str,
    seed: int | None,
    parameters: Tensors,
    mapping: ResolvedMapping,
    save_torch_dist: Save,
    reference: SimpleNamespace,
) -> None:
    # seed: cut at random in every dimension; None: each tensor whole
    folder = save_torch_dist("ckpt", LAYOUTS[layout](parameters, reference), seed)
    views = TorchDistFolder.read(folder).views(mapping)
    assert views.keys() == parameters.keys()
    for name, tensor in parameters.items():
        assert torch.equal(values(views[name]), tensor), name
    pieces = max(len(view.pieces) for view in views.values())
    assert pieces == (2 if "apart" in layout else 1) if seed is None else pieces > 4


def test_only_the_weights_are_asked_for(
    parameters: Tensors,
    mapping: ResolvedMapping,
    save_torch_dist: Save,
) -> None:
    others = {
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(36),
        "chained_0.optimizer.state.fp32_param": torch.zeros(3),
        "rng_state/shard_0_1": torch.zeros(3),
        "opt_param_scheduler": torch.zeros(3),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_3": torch.zeros(1),
    }
    folder = TorchDistFolder.read(save_torch_dist("ckpt", parameters | others))
    assert folder.tensors.keys() == parameters.keys() | others.keys()
    assert folder.weights.keys() == parameters.keys()
    assert folder.views(mapping).keys() == parameters.keys()


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("layout", "change", "says"),
    [
        ("per layer", drop("decoder.layers.1.mlp.linear_fc2.weight"),
         "missing (1):\n  - decoder.layers.1.mlp.linear_fc2.weight"),
        ("stacked", drop("decoder.layers.mlp.linear_fc2.weight"),
         "missing (1):\n  - decoder.layers.mlp.linear_fc2.weight"),
        ("per layer, gate and up apart", drop("decoder.layers.2.mlp.linear_fc1.weight_v"),
         "missing (1):\n  - decoder.layers.2.mlp.linear_fc1.weight_v"),
        ("stacked", lambda t: t.update({"decoder.layers.input_layernorm.weight": torch.ones(3)}),
         "unexpected (1):\n  - decoder.layers.input_layernorm.weight"),
        ("stacked", lambda t: t.update({"output_layer.weight": torch.ones(102, 36)}),
         "output_layer.weight has shape [102, 36], the config asks for [101, 36]"),
        ("stacked", lambda t: t.update(
            {"decoder.layers.mlp.linear_fc2.weight": torch.ones(2, 36, 50)}),
         "has shape [2, 36, 50], the config asks for [3, 36, 50]"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_mappings_are_named(
    layout: str,
    change: Callable[[Tensors], object],
    says: str,
    parameters: Tensors,
    mapping: ResolvedMapping,
    save_torch_dist: Save,
    reference: SimpleNamespace,
) -> None:
    tensors = LAYOUTS[layout](parameters, reference)
    change(tensors)
    folder = TorchDistFolder.read(save_torch_dist("ckpt", tensors))
    with pytest.raises(MappingError) as caught:
        folder.views(mapping)
    assert says in str(caught.value)


def test_an_absent_data_file_is_named(
    parameters: Tensors, mapping: ResolvedMapping, save_torch_dist: Save
) -> None:
    path = save_torch_dist("ckpt", parameters)
    (path / "__0_1.distcp").unlink()
    with pytest.raises(FormatError, match=r"__0_1\.distcp, which holds .* is absent"):
        TorchDistFolder.read(path).views(mapping)


def test_an_archive_of_another_tensor_is_noticed(
    parameters: Tensors, mapping: ResolvedMapping, save_torch_dist: Save
) -> None:
    folder = TorchDistFolder.read(save_torch_dist("ckpt", parameters))
    q, k = (f"decoder.layers.0.self_attention.{x}_layernorm.weight" for x in "qk")
    (wrong,) = folder.tensors[q].chunks
    (other,) = folder.tensors[k].chunks
    folder.tensors[q] = replace(folder.tensors[q], chunks=(replace(wrong, stored=other.stored),))
    says = rf"{q} at \[0\] is bfloat16 \[12\], \.metadata says bfloat16 \[36\]"
    with pytest.raises(FormatError, match=says):
        folder.views(mapping)


# ---------------------------------------------------------------------------------- common state


def test_the_common_state_from_a_file(tmp_path: Path) -> None:
    torch.save({"iteration": 3, "names": {"a"}}, tmp_path / "common.pt")
    folder = TorchDistFolder(tmp_path, {}, {})
    assert folder.common == {"iteration": 3, "names": {"a"}}
    assert folder.args is None


def test_the_common_state_from_an_object_among_the_shards(save_torch_dist: Save) -> None:
    import argparse

    state = [{"iteration": 3, "args": argparse.Namespace(num_layers=2)}]
    path = save_torch_dist("c", {"w": torch.zeros(2), "common_state/shard_0_1": state})
    folder = TorchDistFolder.read(path)
    assert folder.common["iteration"] == 3
    assert folder.args == {"num_layers": 2}
    assert folder.weights.keys() == {"w"}


def test_no_common_state(save_torch_dist: Save) -> None:
    folder = TorchDistFolder.read(save_torch_dist("c", {"w": torch.zeros(2)}))
    assert folder.common == {}
    assert folder.args is None


def test_a_common_state_that_is_no_dictionary(tmp_path: Path) -> None:
    (tmp_path / "common.pt").write_bytes(object_archive([1]))
    with pytest.raises(FormatError, match=r"common\.pt: the common state is not a dictionary"):
        _ = TorchDistFolder(tmp_path, {}, {}).common


def test_code_in_the_common_state_is_refused(tmp_path: Path) -> None:
    torch.save({"x": os.system}, tmp_path / "common.pt")
    with pytest.raises(UnsafePickleError, match=r"common\.pt: the pickle asks for posix\.system"):
        _ = TorchDistFolder(tmp_path, {}, {}).common


def test_no_metadata_is_an_incomplete_save(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no \.metadata: an incomplete save"):
        TorchDistFolder.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not sound JSON"),
        ("[]", "does not hold a JSON object"),
        ("3", "does not hold a JSON object"),
        ('{"a": 1}', "does not name a format"),
        ('{"sharded_backend": 1}', "does not name a format"),
    ],
)
def test_a_format_file_that_names_no_format(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(FormatError, match=rf"metadata\.json: {says}"):
        read_format(tmp_path)


def test_a_stacked_key_drops_the_layer() -> None:
    assert stacked_key("decoder.layers.*.mlp.linear_fc1.weight") == (
        "decoder.layers.mlp.linear_fc1.weight"
    )
    assert stacked_key("output_layer.weight") == "output_layer.weight"


class LookedThrough(dict[str, object]):
    """Counts how often it is looked through."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()


def test_the_names_are_looked_through_once_however_many_tensors_are_missing(
    mapping: ResolvedMapping, tmp_path: Path
) -> None:
    folder = TorchDistFolder(tmp_path, {}, {})
    weights = LookedThrough()
    folder.__dict__["weights"] = weights
    with pytest.raises(MappingError, match="missing"):
        folder.views(mapping)
    assert weights.times == 1
