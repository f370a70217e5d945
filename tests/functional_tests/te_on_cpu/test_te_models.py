"""Every family is made of Transformer Engine's modules, computes what transformers computes, and
loads and saves the same checkpoints as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import nested_values
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file
from stock_megatron import no_strides
from transformers import AutoModelForCausalLM

from megatron_olmo_bridge import (
    AutoBridge,
    export_checkpoint,
    hf_as_megatron,
    import_checkpoint,
    verify,
)
from megatron_olmo_bridge.convert.options import ExportOptions
from megatron_olmo_bridge.inference.forward import forward
from megatron_olmo_bridge.inference.generate import generate
from megatron_olmo_bridge.models.families import published_sizes

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]
Checkpoint = Callable[..., Path]
SIZES = [name for name in published_sizes() if name.endswith("-tiny")]
MIXTURES = ("olmoe-tiny", "flex-olmo-tiny")
POST_NORM = ("olmo2-tiny", "olmo3-tiny", "flex-olmo-tiny")
WEIGHTLESS_NORMS = ("olmo-tiny",)
VOCABULARY = 1000


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))


def parameters(chunks: Chunks) -> dict[str, torch.nn.Parameter]:
    return dict(unwrap_model(chunks)[0].named_parameters())


def poison(chunks: Chunks) -> None:
    with torch.no_grad():
        for parameter in parameters(chunks).values():
            parameter.fill_(float("nan"))


def assert_exports(hf: Path, chunks: Chunks) -> None:
    """The live weights are those of a Hugging Face folder, bit for bit."""
    source = load_file(hf / "model.safetensors")
    for name, tensor in AutoBridge.from_hf_pretrained(hf).export_hf_weights(chunks):
        assert torch.equal(source.pop(name), tensor), name
    assert not source


@pytest.mark.parametrize("size", SIZES)
def test_models_consist_of_transformer_engine_modules(
    size: str, checkpoint: Checkpoint, build: Build
) -> None:
    (model,) = unwrap_model(build(checkpoint(size)))
    layer = model.decoder.layers[0]
    post = "PostLN" if size in POST_NORM else ""
    assert type(layer.self_attention.linear_qkv).__name__ == "TEColumnParallelLinear"
    assert type(layer.self_attention.linear_proj).__name__ == f"TERowParallelLinear{post}"
    assert type(layer.self_attention.core_attention).__name__ == "MaskedTEDotProductAttention"
    if size in MIXTURES:
        experts = layer.mlp.experts
        assert type(experts.linear_fc1).__name__ == "TEColumnParallelGroupedLinear"
        assert type(experts.linear_fc2).__name__ == "TERowParallelGroupedLinear"
    else:
        assert type(layer.mlp.linear_fc1).__name__ == "TEColumnParallelLinear"
        assert type(layer.mlp.linear_fc2).__name__ == f"TERowParallelLinear{post}"
    if size not in WEIGHTLESS_NORMS:
        norm = model.decoder.final_layernorm
        assert type(norm).__module__.startswith("transformer_engine.")
        assert norm.eps == model.config.layernorm_epsilon


@pytest.mark.parametrize("size", SIZES)
def test_float32_logits_equal_those_of_transformers(
    size: str, checkpoint: Checkpoint, build: Build
) -> None:
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint(size))(tokens()).logits
    found = forward(build(checkpoint(size)), tokens(), vocab_size=expected.shape[-1])
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [size for size in SIZES if size not in MIXTURES])
def test_bfloat16_logits_are_as_accurate_as_those_of_transformers(
    size: str, checkpoint: Checkpoint, build: Build
) -> None:
    """Without mixtures: there, rounding sends tokens to other experts."""
    hf = checkpoint(size, "bfloat16")
    with torch.no_grad():
        exact, theirs = (
            AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)(tokens()).logits.float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    found = forward(build(hf), tokens(), vocab_size=exact.shape[-1])
    assert (found - exact).pow(2).mean() <= 1.2**2 * (theirs - exact).pow(2).mean()


@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_those_of_the_local_backend(
    size: str, checkpoint: Checkpoint, build: Build
) -> None:
    found = {}
    for backend in ("transformer_engine", "local"):
        chunks = build(checkpoint(size), backend)
        positions = torch.arange(48).expand(2, 48)
        chunks[0](tokens(), positions, None, labels=tokens().roll(-1, 1)).mean().backward()
        bridge = AutoBridge.from_hf_pretrained(checkpoint(size))
        for parameter in parameters(chunks).values():
            parameter.data = parameter.grad
        found[backend] = dict(bridge.export_hf_weights(chunks))
    for name, expected in found["local"].items():
        difference = (found["transformer_engine"][name] - expected).norm()
        assert expected.norm() > 0, name
        assert difference <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("size", SIZES)
def test_generated_tokens_equal_those_of_the_local_backend(
    size: str, checkpoint: Checkpoint, build: Build
) -> None:
    prompt = tokens()[0, :20].tolist()
    found, expected = (
        list(generate(build(checkpoint(size), backend), prompt, vocab_size=VOCABULARY,
                      max_new_tokens=8))
        for backend in ("transformer_engine", "local")
    )  # fmt: skip
    assert len(expected) == 8
    assert found == expected


@pytest.mark.parametrize("strict", [StrictHandling.RAISE_ALL, StrictHandling.RAISE_UNEXPECTED])
@pytest.mark.parametrize("size", SIZES)
def test_an_import_has_exactly_the_keys_that_stock_megatron_requests(
    size: str, strict: StrictHandling, checkpoint: Checkpoint, build: Build, tmp_path: Path
) -> None:
    """Also with RAISE_ALL: nothing is absent, and nothing is there that isn't asked for."""
    hf = checkpoint(size, "bfloat16")
    import_checkpoint(hf, tmp_path / "megatron")
    chunks = build(hf)
    (model,) = unwrap_model(chunks)
    poison(chunks)
    asked = model.sharded_state_dict()
    objects = [x for x in nested_values(asked) if isinstance(x, ShardedObject)]
    assert any(x.key.endswith("_extra_state") for x in objects)
    with no_strides():
        folder = str(tmp_path / "megatron" / "iter_0000000")
        state = dist_checkpointing.load({"model": asked}, folder, strict=strict)
    model.load_state_dict(state["model"], strict=True)
    assert_exports(hf, chunks)


@pytest.mark.parametrize("size", SIZES)
def test_a_hugging_face_folder_loads_as_a_megatron_checkpoint(
    size: str, checkpoint: Checkpoint, build: Build
) -> None:
    chunks = build(checkpoint(size))
    poison(chunks)
    (model,) = unwrap_model(chunks)
    with hf_as_megatron(checkpoint(size)) as (folder, strategy):
        asked = {"model": model.sharded_state_dict()}
        state = dist_checkpointing.load(asked, folder, sharded_strategy=strategy)
    model.load_state_dict(state["model"], strict=True)
    assert_exports(checkpoint(size), chunks)


@pytest.mark.parametrize("by", ["us", "stock"])
@pytest.mark.parametrize("size", SIZES)
def test_a_saved_model_equals_the_loaded_one(
    size: str, by: str, checkpoint: Checkpoint, build: Build, tmp_path: Path
) -> None:
    hf = checkpoint(size, "bfloat16")
    bridge = AutoBridge.from_hf_pretrained(hf)
    chunks = build(hf)
    saved = tmp_path / "saved"
    if by == "us":
        bridge.save_megatron_model(chunks, saved)
        bridge.save_hf_pretrained(chunks, tmp_path / "hf")
        assert verify(hf, saved).equal
    else:
        saved.mkdir()
        dist_checkpointing.save(unwrap_model(chunks)[0].sharded_state_dict(), str(saved))
        export_checkpoint(saved, tmp_path / "hf", ExportOptions(hf_config=hf))
    assert verify(hf, tmp_path / "hf").equal
