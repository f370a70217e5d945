"""Attention takes the kernel that ``doctor`` names; with a padding mask the unfused one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from transformers import AutoModelForCausalLM

from megatron_olmo_bridge import synth
from megatron_olmo_bridge.models.attention_kernels import attention_kernels
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.nn.classification import padding_mask

Build = Callable[..., list[torch.nn.Module]]
SIZES = [
    name
    for name in published_sizes()
    if name.endswith("-tiny") and "moe" not in name and "flex" not in name
]
PAD = 0


def test_every_family_has_a_fast_kernel() -> None:
    kernels = attention_kernels()
    assert kernels
    for kernel in kernels:
        assert kernel.kernel.startswith(("flash attention", "cuDNN")), kernel


@pytest.mark.parametrize("size", SIZES)
def test_left_padded_logits_in_bfloat16_equal_those_of_transformers(
    size: str, tmp_path: Path, build: Build
) -> None:
    hf = synth(size, tmp_path / "hf", dtype="bfloat16")
    batch = torch.randint(1, 1000, (3, 48), generator=torch.Generator().manual_seed(1)).cuda()
    for row, length in zip(batch, (48, 31, 1), strict=True):
        row[: 48 - length] = PAD
    real = batch != PAD
    with torch.no_grad():
        exact, theirs = (
            AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)
            .cuda()(batch, attention_mask=real.long())
            .logits.float()[real]
            for dtype in (torch.float32, torch.bfloat16)
        )
        (chunk,) = build(hf, "transformer_engine")
        positions = torch.arange(48, device="cuda").expand_as(batch)
        found = chunk(batch, positions, padding_mask(batch, PAD)).float()[real]
    error = (found[:, : exact.shape[-1]] - exact).pow(2).mean()
    assert error <= 1.2**2 * (theirs - exact).pow(2).mean()
