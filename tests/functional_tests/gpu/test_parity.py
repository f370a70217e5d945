"""The Transformer Engine spec computes what transformers and the local spec compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.utils import unwrap_model
from transformers import Olmo2ForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from megatron_olmo_bridge.nn.backends import backend_named

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]
Record = Callable[..., None]
BACKENDS = ["transformer_engine", "local"]


def logits_of(
    chunks: Chunks, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        return chunks[0](tokens, positions, mask).float()


def transformers_logits(hf: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    model = Olmo2ForCausalLM.from_pretrained(hf, dtype=dtype, attn_implementation="eager").cuda()
    with torch.no_grad():
        return model(tokens).logits.float()


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def rms(difference: torch.Tensor) -> float:
    return float(difference.pow(2).mean().sqrt())


def test_auto_is_transformer_engine_here() -> None:
    assert backend_named("auto").transformer_engine


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_logits(
    backend: str, hf: Path, tokens: torch.Tensor, build: Build, record: Record
) -> None:
    expected = transformers_logits(hf, tokens, torch.float32)
    assert largest(expected) > 1, "logits near zero would agree whatever the model does"
    error = largest(logits_of(build(hf, backend), tokens) - expected)
    record(f"float32 logits, {backend}", error=error, absmax=largest(expected))
    assert error <= 1e-4 * largest(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_logits_are_as_accurate_as_those_of_transformers(
    backend: str, hf_bfloat16: Path, tokens: torch.Tensor, build: Build, record: Record
) -> None:
    exact = transformers_logits(hf_bfloat16, tokens, torch.float32)
    theirs = rms(transformers_logits(hf_bfloat16, tokens, torch.bfloat16) - exact)
    ours = rms(logits_of(build(hf_bfloat16, backend), tokens) - exact)
    record(f"bfloat16 logits, {backend}", rms_error=ours, of_transformers=theirs)
    assert theirs > 0
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_explicit_causal_mask_changes_nothing(
    backend: str, hf: Path, tokens: torch.Tensor, build: Build
) -> None:
    chunks, length = build(hf, backend), tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").triu(1)
    without = logits_of(chunks, tokens)
    assert largest(logits_of(chunks, tokens, mask) - without) <= 1e-4 * largest(without)


def test_gradients_equal_those_of_the_local_spec(
    hf: Path, tokens: torch.Tensor, build: Build, record: Record
) -> None:
    found = []
    for backend in BACKENDS:
        chunks = build(hf, backend)
        positions = torch.arange(tokens.shape[1], device="cuda").expand_as(tokens)
        losses = chunks[0](tokens, positions, None, labels=tokens.roll(-1, 1))
        losses.mean().backward()
        found.append({name: p.grad for name, p in unwrap_model(chunks)[0].named_parameters()})
    engine, local = found
    assert engine.keys() == local.keys()
    errors = {name: largest(engine[name] - local[name]) / largest(local[name]) for name in local}
    record("float32 gradients, transformer_engine against local", error=max(errors.values()))
    assert max(errors.values()) <= 1e-3, errors


def test_the_norm_has_olmos_order_of_operations(build: Build, hf_bfloat16: Path) -> None:
    """The weight comes before the cast. In Llama's order a quarter of the elements differ."""
    build(hf_bfloat16, "transformer_engine")  # sets up the process groups
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=512,
        num_attention_heads=8,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    ours = backend_named("transformer_engine").norm(config, 512, eps=1e-6)
    theirs = Olmo2RMSNorm(512, eps=1e-6).to(torch.bfloat16).cuda()
    torch.manual_seed(0)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 1.5)
        ours.weight.copy_(theirs.weight)
        x = torch.randn(64, 2, 512, device="cuda", dtype=torch.bfloat16)
        assert (ours(x) == theirs(x)).float().mean() > 0.97
