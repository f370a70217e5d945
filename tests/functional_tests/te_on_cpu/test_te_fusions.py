"""What is fused beside Transformer Engine computes what it computes unfused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import unwrap_model

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.models.families import published_sizes

Checkpoint = Callable[..., Path]
Build = Callable[..., list[torch.nn.Module]]
SIZES = [name for name in published_sizes() if name.endswith("-tiny")]
MIXTURES = ("olmoe-tiny", "flex-olmo-tiny")


def batch() -> torch.Tensor:
    return torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(1))


def losses_and_gradients(chunk: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    positions = torch.arange(32).expand(2, 32)
    losses = chunk(batch(), positions, None, labels=batch().roll(-1, 1))
    losses.mean().backward()
    (model,) = unwrap_model([chunk])
    return losses.detach(), {
        name: getattr(parameter, "main_grad", parameter.grad).clone()
        for name, parameter in model.named_parameters()
    }


def placeholder(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """What autograd is given where a gradient was added to its buffer already."""
    return torch.zeros(shape, dtype=dtype) if zero else torch.full(shape, float("nan"), dtype=dtype)


def assert_same(found: Any, expected: Any) -> None:
    (losses, gradients), (expected_losses, expected_gradients) = found, expected
    assert (losses - expected_losses).abs().max() <= 1e-5
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("size", SIZES)
def test_the_expected_fusions_are_on(size: str, checkpoint: Checkpoint, build: Build) -> None:
    with patch.object(moe_utils, "fused_permute", print):  # a version that has this kernel alone
        config = unwrap_model(build(checkpoint(size)))[0].config
    assert config.bias_dropout_fusion
    assert config.bias_activation_fusion == (size != "gpt2-tiny")
    assert not config.gradient_accumulation_fusion
    if size in MIXTURES:
        assert config.moe_token_dispatcher_type == "alltoall"
        assert (config.moe_permute_fusion, config.moe_router_fusion) == (True, False)
    config = unwrap_model(build(checkpoint(size), fusions=False))[0].config
    assert not config.bias_dropout_fusion
    assert not config.bias_activation_fusion


@pytest.mark.parametrize("size", SIZES)
def test_fused_losses_and_gradients_equal_unfused_ones(
    size: str, checkpoint: Checkpoint, build: Build
) -> None:
    function = "WeightedSwiGLUFunction" if size in MIXTURES else "SwiGLUFunction"
    with patch.object(
        getattr(fused_bias_swiglu, function),
        "forward",
        wraps=getattr(fused_bias_swiglu, function).forward,
    ) as fused:
        found = losses_and_gradients(build(checkpoint(size))[0])
        assert fused.called == (size != "gpt2-tiny")
        fused.reset_mock()
        expected = losses_and_gradients(build(checkpoint(size), fusions=False)[0])
        assert not fused.called
    assert_same(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_fused_gradient_accumulation_gives_the_same_gradients(
    size: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses Transformer Engine's own autograd functions; PyTorch replaces APEX's kernel."""

    def wrapped() -> torch.nn.Module:
        provider = AutoBridge.from_hf_pretrained(checkpoint(size)).to_megatron_provider()
        provider.backend = "transformer_engine"
        (chunk,) = provider.provide_distributed_model(wrap_with_ddp=True)
        return chunk

    plain = wrapped()
    assert not unwrap_model([plain])[0].config.gradient_accumulation_fusion
    expected = losses_and_gradients(plain)
    calls = []

    def added(inputs: torch.Tensor, grads: torch.Tensor, total: torch.Tensor) -> None:
        calls.append(total.shape)
        total.add_(grads.flatten(0, -2).T.float() @ inputs.flatten(0, -2).float())

    # It allocates on "cuda" in the backward pass, which is outside the CPU runtime's mode.
    for module in list(sys.modules.values()):
        if "get_dummy_wgrad" in vars(module):
            monkeypatch.setattr(module, "get_dummy_wgrad", placeholder)
    apex = SimpleNamespace(wgrad_gemm_accum_fp32=added)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
    fused = wrapped()
    assert unwrap_model([fused])[0].config.gradient_accumulation_fusion
    assert_same(losses_and_gradients(fused), expected)
    assert calls
