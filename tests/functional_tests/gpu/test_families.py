"""Every family on Transformer Engine: the logits of transformers, and the same bits back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_olmo_bridge import AutoBridge, import_checkpoint, synth
from megatron_olmo_bridge.models.families import published_sizes

Build = Callable[..., list[torch.nn.Module]]
Record = Callable[..., None]
SIZES = [name for name in published_sizes() if name.endswith("-tiny")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["transformer_engine", "local"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_and_export(
    size: str, backend: str, dtype: str, tmp_path: Path, build: Build, record: Record
) -> None:
    hf = synth(size, tmp_path / "hf", dtype=dtype)
    tokens = torch.randint(2, 1000, (2, 64), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.arange(64, device="cuda").expand_as(tokens)
    import_checkpoint(hf, tmp_path / "megatron")
    chunks = build(tmp_path / "megatron", backend)
    with torch.no_grad():
        found = chunks[0](tokens, positions, None).float()
        expected, theirs = (
            AutoModelForCausalLM.from_pretrained(hf, dtype=kind).cuda()(tokens).logits.float()
            for kind in (torch.float32, getattr(torch, dtype))
        )
    error = float((found[..., : expected.shape[-1]] - expected).abs().max())
    noise = float((theirs - expected).abs().max())
    record(f"{size}, {backend}, {dtype}", error=error, of_transformers=noise)
    if dtype == "float32":
        assert error <= 1e-4 * float(expected.abs().max())
    elif "moe" not in size and "flex" not in size:  # there, rounding sends tokens elsewhere
        assert error <= 2 * noise
    source = load_file(hf / "model.safetensors")
    for name, tensor in AutoBridge.from_hf_pretrained(hf).export_hf_weights(chunks, cpu=True):
        assert torch.equal(source.pop(name), tensor), name
    assert not source
