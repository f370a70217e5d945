"""An attention mask is honoured: flash attention and cuDNN's kernel, which take none, are left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_engine.pytorch.attention.dot_product_attention import backends
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.nn.classification import padding_mask

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]
Checkpoint = Callable[..., Path]
SIZES = [name for name in published_sizes() if name.endswith("-tiny")]
MIXTURES = ("olmoe-tiny", "flex-olmo-tiny")
CLASSIFIERS = ("olmo-tiny", "olmo2-tiny", "olmo3-tiny")
PAD, LENGTHS, COLUMNS = 0, (48, 31, 17, 1), 48


def padded(side: str) -> torch.Tensor:
    """Sequences of several lengths, [4, 48]."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(1, 1000, (len(LENGTHS), COLUMNS), generator=generator)
    for row, length in zip(batch, LENGTHS, strict=True):
        if side == "left":
            row[: COLUMNS - length] = PAD
        else:
            row[length:] = PAD
    return batch


def logits(chunks: Chunks, batch: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    positions = torch.arange(batch.shape[1]).expand_as(batch)
    with torch.no_grad():
        return chunks[0].eval()(batch, positions, mask).float()


def assert_as_near(
    found: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, dtype: str
) -> None:
    """Ours as near to float32 as those of transformers in the same dtype; in float32 the same."""
    if dtype == "float32":
        assert (found - exact).abs().max() <= 1e-5
    else:
        assert (found - exact).pow(2).mean() <= 1.2**2 * (theirs - exact).pow(2).mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", SIZES)
def test_padded_logits_equal_those_of_transformers(
    size: str, side: str, dtype: str, checkpoint: Checkpoint, build: Build
) -> None:
    if size in MIXTURES and dtype != "float32":
        pytest.skip("rounding sends tokens to other experts; what attention gets is tested below")
    hf, batch = checkpoint(size, dtype), padded(side)
    real = batch != PAD
    with torch.no_grad():
        exact, theirs = (
            AutoModelForCausalLM.from_pretrained(hf, dtype=kind)(
                batch, attention_mask=real.long()
            ).logits.float()[real]
            for kind in (torch.float32, getattr(torch, dtype))
        )
    found = logits(build(hf), batch, padding_mask(batch, PAD))[real][:, : exact.shape[-1]]
    assert_as_near(found, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", CLASSIFIERS)
def test_left_padded_batches_are_classified_as_by_transformers(
    size: str, dtype: str, checkpoint: Checkpoint, build: Build, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(
        checkpoint(size), num_labels=5, pad_token_id=PAD
    ).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    batch = padded("left")
    with torch.no_grad():
        exact, theirs = (
            AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=kind)(
                batch, attention_mask=(batch != PAD).long()
            ).logits.float()
            for kind in (torch.float32, getattr(torch, dtype))
        )
    found = logits(build(tmp_path), batch, padding_mask(batch, PAD))
    near = 1e-5 if dtype == "float32" else 3 * (theirs - exact).abs().max()
    assert (found - exact).abs().max() <= near


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What reaches Transformer Engine's kernels, layer by layer: (kernel, mask type, mask)."""
    seen: list[tuple[Any, ...]] = []
    for name in ("FusedAttention", "UnfusedDotProductAttention"):
        kernel = getattr(backends, name)

        def recorded(
            self: Any, *args: Any, _name: str = name, _forward: Any = kernel.forward, **kwargs: Any
        ) -> Any:
            seen.append((_name, kwargs["attn_mask_type"], kwargs["attention_mask"]))
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(kernel, "forward", recorded)
    yield seen


@pytest.mark.parametrize("size", SIZES)
def test_kernels_receive_the_expected_arguments_in_bfloat16(
    size: str, checkpoint: Checkpoint, build: Build, calls: list[tuple[Any, ...]]
) -> None:
    batch, chunks = padded("left"), build(checkpoint(size, "bfloat16"))
    causal = torch.ones(1, 1, COLUMNS, COLUMNS, dtype=torch.bool).triu(1)
    for mask in (None, causal, causal.expand(len(batch), -1, -1, -1)):
        logits(chunks, batch, mask)
    assert {call[:2] for call in calls} == {("FusedAttention", "causal")}
    assert all(mask is None for *_, mask in calls)
    calls.clear()
    mask = padding_mask(batch, PAD)
    logits(chunks, batch, mask)
    assert {call[:2] for call in calls} == {("UnfusedDotProductAttention", "arbitrary")}
    assert all(found is mask for *_, found in calls)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(4, 1, 1, COLUMNS, dtype=torch.bool),
        torch.zeros(4, COLUMNS, dtype=torch.bool),
        torch.zeros(4, 1, COLUMNS, COLUMNS, dtype=torch.int64),
    ],
    ids=["of keys alone", "of tokens", "of numbers"],
)
@pytest.mark.parametrize("backend", ["transformer_engine", "local"])
def test_an_unsupported_mask_is_refused(
    backend: str, mask: torch.Tensor, checkpoint: Checkpoint, build: Build
) -> None:
    with pytest.raises(InputError, match=r"must be bool \[batch or 1, 1, 48, 48\], True where"):
        logits(build(checkpoint("olmo2-tiny"), backend), padded("left"), mask)
