"""Greedy generation gives the tokens that transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from transformers import Olmo2ForCausalLM

from megatron_olmo_bridge.inference.generate import generate

Build = Callable[..., list[torch.nn.Module]]


def expected_tokens(hf: Path, prompt: list[int], count: int) -> list[int]:
    """The likeliest token, the whole sequence anew for each."""
    model = Olmo2ForCausalLM.from_pretrained(hf, dtype=torch.float32).cuda()
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([tokens], device="cuda")).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", ["transformer_engine", "local"])
@pytest.mark.parametrize("prompt", [[7], [3, 999, 41, 0, 12]])
def test_greedy_tokens(backend: str, prompt: list[int], hf: Path, build: Build) -> None:
    expected = expected_tokens(hf, prompt, 32)
    assert len(set(expected)) > 3, "a model that repeats itself proves little"
    found = generate(build(hf, backend), prompt, vocab_size=1000, max_new_tokens=32)
    assert list(found) == expected
