"""Time and memory of a forward and a backward pass of the 1B model, 4096 tokens in bfloat16."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("megatron.core")

from transformers import AutoModelForCausalLM, Olmo2Config

from megatron_olmo_bridge import Olmo2ModelProvider1B
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge

Record = Callable[..., None]
LENGTH, WARM_UP, TIMES = 4096, 3, 10
VOCAB = Olmo2Bridge.sizes["olmo2-1b"]["vocab_size"]


def megatron(backend: str) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    provider = Olmo2ModelProvider1B(params_dtype=torch.bfloat16, backend=backend)
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(LENGTH, device="cuda").expand_as(tokens)
        return chunk(tokens, positions, None, labels=tokens).float().mean()

    return chunk, loss_of


def transformers() -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    config = Olmo2Config(**Olmo2Bridge.sizes["olmo2-1b"])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    return model.train(), loss_of


@pytest.mark.parametrize("what", ["transformer_engine", "local", "transformers"])
def test_forward_and_backward(what: str, record: Record) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    model, loss_of = transformers() if what == "transformers" else megatron(what)
    tokens = torch.randint(0, VOCAB, (1, LENGTH), device="cuda")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for i in range(WARM_UP + TIMES):
        if i == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        model.zero_grad(set_to_none=True)
        loss = loss_of(tokens)
        loss.backward()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / TIMES
    peak = torch.cuda.max_memory_allocated()
    record(
        f"1B, bfloat16, {LENGTH} tokens, {what}",
        seconds=seconds,
        tokens_per_second=LENGTH / seconds,
        peak_gib=peak / 2**30,
        weights_gib=weights / 2**30,
        loss=loss.item(),
    )
    # Random weights know nothing: the loss is that of guessing.
    assert abs(loss.item() - math.log(VOCAB)) < 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert peak > 2 * weights, "weights and gradients at least"
