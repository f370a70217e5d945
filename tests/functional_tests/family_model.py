"""Do with live models of every family what users do, in steps like those of ``live_model.py``.

    family_model.py '[{"action": "language_model", "out": "FOLDER", "hf": "FOLDER", ...}, ...]'

Building a model takes longer than using it, so each step does as much as possible with one model.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from live_layouts import Step
from live_model import (
    Chunks,
    build,
    built_poisoned,
    digests,
    disagreement,
    enter_layout,
    everyone,
    forward_backward,
    save,
)
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.inference.forward import evaluating, forward
from megatron_olmo_bridge.models.provider import GPTModelProvider
from megatron_olmo_bridge.nn import self_attention
from megatron_olmo_bridge.nn.classification import padding_mask
from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups


def loaded(step: Step) -> tuple[AutoBridge, GPTModelProvider, Chunks]:
    """Build a model for training at the step's layout, poison it with NaN, and load its weights."""
    bridge, provider, chunks = build(step, DistributedDataParallelConfig())
    poisoned = all(bool(p.isnan().all()) for chunk in chunks for p in chunk.parameters())
    save(step, "poisoned.json", everyone(poisoned))
    bridge.load_hf_weights(chunks)
    return bridge, provider, chunks


def save_weights(step: Step, bridge: AutoBridge, chunks: Chunks) -> None:
    """Save digests of the exported weights and, if the step asks for it, a checkpoint."""
    save(step, "exported.json", digests(bridge.export_hf_weights(chunks)))
    if step.get("saves"):
        bridge.save_megatron_model(chunks, Path(step["out"]) / "megatron")


def save_gradients(step: Step, bridge: AutoBridge, chunks: Chunks, loss: float) -> None:
    """Save the gradients by Hugging Face names; they overwrite the weights, so call this last."""
    copies = disagreement(chunks)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    found = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks)}
    save(step, "gradients.pt", {"loss": loss, "gradients": found, "copies": copies})


def of_last_stage(mine: Any) -> list[Any]:
    """Gather a value from each process of the last pipeline stage; on other stages it is None."""
    return [found for found in everyone(mine) if found is not None]


# ------------------------------------------------------------------------------- language models


def language_model(step: Step) -> None:
    """Save logits of a batch, the exported weights, and gradients from Megatron's own schedule."""
    bridge, provider, chunks = loaded(step)
    tokens = torch.tensor(step["tokens"])
    logits = forward(chunks, tokens, vocab_size=bridge.model_bridge.vocab_size)
    save(step, "logits.pt", of_last_stage(logits))
    save_weights(step, bridge, chunks)
    if step["trains"]:
        save_gradients(step, bridge, chunks, forward_backward(provider, chunks, tokens))


def mutants(step: Step) -> None:
    """Save logits of models that have the checkpoint's weights but other config values.

    Such a model can't load the checkpoint, so it copies the weights of a correct model.
    """
    bridge, _, (right,) = build(step)
    bridge.load_hf_weights([right])
    tokens = torch.tensor(step["tokens"])
    for name, fields in step["mutants"].items():
        provider = bridge.to_megatron_provider(load_weights=False)
        everywhere = fields.pop("yarn everywhere", False)
        for field, value in fields.items():
            if isinstance(value, dict):
                value = getattr(provider, field) | value
            setattr(provider, field, value)
        # No field does this: give every layer the RoPE of the layers without a window.
        nowhere_windowed = patch.object(self_attention, "is_layer_window_attention", lambda *_: 0)
        with nowhere_windowed if everywhere else contextlib.nullcontext():
            (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
        chunk.load_state_dict(right.state_dict())
        save(
            step, f"{name}.pt", forward([chunk], tokens, vocab_size=bridge.model_bridge.vocab_size)
        )


# ----------------------------------------------------------------------------------- classifiers


def classify(
    provider: GPTModelProvider,
    chunks: Chunks,
    tokens: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return logits of padded sequences; with labels, their losses, with gradients in the chunks.

    Runs Megatron's own schedule in microbatches of two rows. None on stages before the last.
    """

    def step(iterator: Any, chunk: Any) -> Any:
        batch, classes = next(iterator)
        pad = provider.pad_token_id
        mask = None if pad is None else padding_mask(batch, pad)
        positions = torch.arange(batch.shape[1]).expand_as(batch)
        output = chunk(batch, positions, mask, labels=classes)
        return output, lambda found: (found.mean(), {"found": found.detach()})

    training = labels is not None
    provider.finalize_model_grads_func = finalize_model_grads
    for chunk in chunks if training else ():
        chunk.zero_grad_buffer()
    batches = tokens.split(2)
    split_labels = itertools.repeat(None) if labels is None else labels.split(2)
    mode = contextlib.nullcontext() if training else evaluating(chunks)
    with torch.set_grad_enabled(training), mode:
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=zip(batches, split_labels, strict=False),
            model=chunks,
            num_microbatches=len(batches),
            seq_length=tokens.shape[1],
            micro_batch_size=len(batches[0]),
            forward_only=not training,
        )
    return torch.cat([output["found"] for output in outputs]) if outputs else None


def classifier(step: Step) -> None:
    """Save logits of a batch, the exported weights, and gradients."""
    bridge, provider, chunks = loaded(step)
    tokens, labels = torch.tensor(step["tokens"]), torch.tensor(step["labels"])
    save(step, "logits.pt", of_last_stage(classify(provider, chunks, tokens)))
    save_weights(step, bridge, chunks)
    losses = of_last_stage(classify(provider, chunks, tokens, labels))
    save_gradients(step, bridge, chunks, float(torch.stack(losses).mean()))


def no_padding(step: Step) -> None:
    """Save logits of one sequence without ``pad_token_id``, and the error for two sequences."""
    bridge, provider, chunks = build(step)
    bridge.load_hf_weights(chunks)
    provider.pad_token_id = None
    tokens = torch.tensor(step["tokens"])
    save(step, "logits.pt", classify(provider, chunks, tokens[:1]))
    try:
        classify(provider, chunks, tokens[:2])
    except InputError as error:
        save(step, "refused.json", str(error))


def new_head(step: Step) -> None:
    """Load a language model's weights into a classifier, whose head the checkpoint doesn't have."""
    enter_layout(step["fields"])
    bridge = AutoBridge.from_hf_pretrained(step["hf"], num_labels=step["num_labels"])
    with built_poisoned():
        chunks = bridge.to_megatron_provider().provide_distributed_model(wrap_with_ddp=False)
    save(step, "exported.json", digests(bridge.export_hf_weights(chunks)))
    bridge.save_hf_pretrained(chunks, Path(step["out"]) / "hf")


ACTIONS = (language_model, mutants, classifier, no_padding, new_head)


def main() -> None:
    actions = {action.__name__: action for action in ACTIONS}
    for step in json.loads(sys.argv[1]):
        began = time.perf_counter()
        actions[step["action"]](step)
        if dist.get_rank() == 0:
            print(f"{step['action']} {step['out']}: {time.perf_counter() - began:.1f} s")
    dist.barrier()  # a process that exits early would close the others' connections
    destroy_process_groups()


if __name__ == "__main__":
    main()
