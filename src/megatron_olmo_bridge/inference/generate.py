"""Generate tokens with a live model: greedy, or sampled with temperature and top-p."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.utils import get_model_config

from megatron_olmo_bridge.errors import UnsupportedError

from .forward import forward
from .sampling import check_request, choose


def generate(
    chunks: Sequence[torch.nn.Module],
    prompt: Sequence[int],
    *,
    vocab_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at: Collection[int] = (),
) -> Iterator[int]:
    """Continue a prompt, token by token; all processes iterate, and get the same tokens.

    Keys and values of earlier tokens are cached, by megatron-core.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        prompt: token ids.
        vocab_size: vocabulary of the model, without padding rows.
        max_new_tokens: maximum number of tokens to generate.
        temperature: 0 takes the likeliest token (greedy); 1 samples from the model's distribution.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of the sampling.
        stop_at: end after one of these tokens.

    Raises:
        InputError: an option is out of range, or the prompt does not fit the model.
        UnsupportedError: virtual pipelining or sequence parallelism.
    """
    config = get_model_config(chunks[0])
    check_request(
        prompt,
        vocab_size=vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    if len(chunks) > 1 or config.sequence_parallel:
        raise UnsupportedError("generation takes neither virtual pipelining nor sequence_parallel")
    room = len(prompt) + max_new_tokens
    cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=room)
    generator = torch.Generator().manual_seed(seed)
    tokens, start = torch.tensor([list(prompt)]), 0
    for _ in range(max_new_tokens):
        logits = forward(
            chunks, tokens, vocab_size=vocab_size, start=start, inference_context=cache
        )
        start += tokens.shape[1]
        cache.sequence_len_offset = start
        cache.enable_decode_mode()
        token = None if logits is None else choose(logits[0, -1], temperature, top_p, generator)
        token = _broadcast_from_last_stage(token)
        yield token
        if token in stop_at:
            return
        tokens = torch.tensor([[token]])


def _broadcast_from_last_stage(token: int | None) -> int:
    """Broadcast the last pipeline stage's token to all stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    shared = torch.tensor([-1 if token is None else token], device=torch.cuda.current_device())
    dist.broadcast(shared, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return int(shared)
