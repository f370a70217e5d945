"""Run a live model on a batch of tokens, at any parallel layout, without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model

from .jobs import EMBEDDING, FINAL_NORM


def forward(
    chunks: Sequence[torch.nn.Module],
    tokens: torch.Tensor,
    *,
    vocab_size: int,
    start: int = 0,
    inference_context: Any = None,
) -> torch.Tensor | None:
    """Return a batch's logits, by megatron-core's pipeline schedule; all processes call it.

    Args:
        chunks: as ``provide_distributed_model`` returns them.
        tokens: [b, s] of int64, the same in all processes.
        vocab_size: vocabulary of the model, without padding rows.
        start: position of the first token, where those before it are in the cache.
        inference_context: megatron-core's key/value cache, if there is one.

    Returns:
        [b, s, vocab_size] of float32 on the last pipeline stage, with a cache the last position
        only; None on the other stages.
    """
    batch = tokens.to(torch.cuda.current_device())
    positions = torch.arange(start, start + batch.shape[1], device=batch.device).expand_as(batch)

    def step(_: Any, chunk: torch.nn.Module) -> Any:
        logits = chunk(
            batch, positions, None, inference_context=inference_context, runtime_gather_output=True
        )
        return logits, lambda output: (output.new_zeros(()), {"logits": output})

    # The interleaved schedule takes as many microbatches as there are stages, or a multiple.
    copies = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1
    with torch.no_grad(), evaluating(chunks):
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(())] * len(chunks),
            model=list(chunks),
            num_microbatches=copies,
            seq_length=batch.shape[1],
            micro_batch_size=batch.shape[0],
            forward_only=True,
        )
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
    return outputs[0]["logits"][..., :vocab_size].float()  # type: ignore[no-any-return]


@contextlib.contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put the chunks in evaluation mode (no dropout) within this context."""
    before = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, before, strict=True):
            chunk.train(training)


@contextlib.contextmanager
def hidden_states(chunks: Sequence[torch.nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the outputs of embedding, layers and final norm while the model runs.

    Yields:
        ``embedding``, ``layer 0`` ... and ``final norm`` to [b, s, hidden] of float32 on the CPU,
        of this process's pipeline stage; filled as the model runs.
    """
    found: dict[str, torch.Tensor] = {}
    hooks = []

    def keep(name: str, module: torch.nn.Module, gathered: bool) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if gathered:
                hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
            found[name] = hidden.detach().transpose(0, 1).float().cpu()

        hooks.append(module.register_forward_hook(hook))

    for chunk in unwrap_model(list(chunks)):
        split = get_model_config(chunk).sequence_parallel
        if chunk.pre_process:
            keep(EMBEDDING, chunk.embedding, split)
        for layer in chunk.decoder.layers:
            keep(f"layer {layer.layer_number - 1}", layer, split)
        if chunk.post_process:
            keep(FINAL_NORM, chunk.decoder.final_layernorm, split)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
