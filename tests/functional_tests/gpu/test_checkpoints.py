"""Weights on the GPU: loaded, streamed out and saved, without a bit changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file
from stock_megatron import no_strides

from megatron_olmo_bridge import AutoBridge, hf_as_megatron, import_checkpoint, verify

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]
BACKENDS = ["transformer_engine", "local"]
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(params=DTYPES)
def checkpoint(request: pytest.FixtureRequest, hf: Path, hf_bfloat16: Path) -> Path:
    return hf if request.param == "float32" else hf_bfloat16


@pytest.fixture
def imported(checkpoint: Path, tmp_path: Path) -> Path:
    import_checkpoint(checkpoint, tmp_path / "imported")
    return tmp_path / "imported"


def poison(chunks: Chunks) -> None:
    """A value that is never set will show."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


def assert_holds(chunks: Chunks, checkpoint: Path) -> None:
    """The model has the checkpoint's values, bit for bit, on the GPU."""
    bridge = AutoBridge.from_hf_pretrained(checkpoint)
    expected = load_file(checkpoint / "model.safetensors")
    found = dict(bridge.export_hf_weights(chunks))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].is_cuda
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].cpu(), tensor), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_is_filled_on_the_gpu(
    backend: str, checkpoint: Path, imported: Path, build: Build
) -> None:
    for source in (checkpoint, imported):
        chunks = build(source, backend)
        assert all(parameter.is_cuda for parameter in chunks[0].parameters())
        assert_holds(chunks, checkpoint)
        poison(chunks)
        AutoBridge.from_checkpoint(source).load_hf_weights(chunks)
        assert_holds(chunks, checkpoint)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_come_to_the_cpu_on_request(backend: str, checkpoint: Path, build: Build) -> None:
    chunks = build(checkpoint, backend)
    expected = load_file(checkpoint / "model.safetensors")
    bridge = AutoBridge.from_hf_pretrained(checkpoint)
    for name, tensor in bridge.export_hf_weights(chunks, rank=0, cpu=True):
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, expected.pop(name)), name
    assert not expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_checkpoints_equal_the_loaded_ones(
    backend: str, checkpoint: Path, build: Build, tmp_path: Path
) -> None:
    bridge, chunks = AutoBridge.from_hf_pretrained(checkpoint), build(checkpoint, backend)
    bridge.save_hf_pretrained(chunks, tmp_path / "hf")
    bridge.save_megatron_model(chunks, tmp_path / "megatron", iteration=3)
    assert verify(checkpoint, tmp_path / "hf").equal
    assert verify(checkpoint, tmp_path / "megatron").equal
    for other in BACKENDS:  # saved by one, loaded into either
        assert_holds(bridge.load_megatron_model(tmp_path / "megatron", backend=other), checkpoint)


def extra_states(model: torch.nn.Module) -> set[str]:
    return {name for name in model.state_dict() if name.endswith("_extra_state")}


@pytest.mark.parametrize("strict", [StrictHandling.RAISE_ALL, StrictHandling.RAISE_UNEXPECTED])
def test_stock_megatron_loads_an_import_into_transformer_engine(
    strict: StrictHandling, checkpoint: Path, imported: Path, build: Build
) -> None:
    """Nothing that the model asks for is absent; with RAISE_ALL nothing is left over either."""
    chunks = build(checkpoint, "transformer_engine")
    poison(chunks)
    (model,) = unwrap_model(chunks)
    asked = model.sharded_state_dict()
    with no_strides():
        state = dist_checkpointing.load(asked, str(imported / "iter_0000000"), strict=strict)
    names = set(model.state_dict())
    left = model.load_state_dict({n: v for n, v in state.items() if n in names}, strict=False)
    assert not left.unexpected_keys
    # megatron-core saves no state of the attention, and Transformer Engine may do without.
    assert all(n.endswith("core_attention._extra_state") for n in left.missing_keys)
    assert_holds(chunks, checkpoint)
    layer = (
        "self_attention.linear_qkv",
        "self_attention.linear_proj.post_layernorm",
        "mlp.linear_fc2",
        "mlp.linear_fc2.post_layernorm",
    )
    assert {f"decoder.layers.3.{name}._extra_state" for name in layer} <= extra_states(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_megatron_loads_a_hugging_face_folder(
    backend: str, checkpoint: Path, build: Build
) -> None:
    chunks = build(checkpoint, backend)
    poison(chunks)
    (model,) = unwrap_model(chunks)
    with hf_as_megatron(checkpoint) as (folder, strategy):
        state = dist_checkpointing.load(
            model.sharded_state_dict(), folder, sharded_strategy=strategy
        )
    names = set(model.state_dict())
    left = model.load_state_dict({n: v for n, v in state.items() if n in names}, strict=False)
    assert all(n.endswith("core_attention._extra_state") for n in left.missing_keys)
    assert_holds(chunks, checkpoint)
