"""Processes started by ``compare``, ``roundtrip`` and ``generate``.

The environment has the :class:`inference.jobs.Job` as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from megatron_olmo_bridge.live.auto_bridge import AutoBridge
from megatron_olmo_bridge.runtime.launch import reporting_errors
from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups

from .forward import forward, hidden_states
from .generate import generate
from .jobs import JOB, LOGITS, STEP, TOKEN, Job


def main() -> None:
    """Run a job, as one of its processes."""
    job = Job(**json.loads(os.environ[JOB]))
    with reporting_errors():
        bridge = AutoBridge.from_checkpoint(job.checkpoint)
        dtype = None if job.dtype == "keep" else getattr(torch, job.dtype)
        provider = bridge.to_megatron_provider(dtype=dtype)
        provider.tensor_model_parallel_size = job.tp
        provider.pipeline_model_parallel_size = job.pp
        provider.sequence_parallel = job.sp
        provider.expert_model_parallel_size = job.ep
        provider.make_vocab_size_divisible_by = job.tp
        assert bridge.source is not None
        _tell(f"load {bridge.source.path}")
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        if job.states:
            _tell("run megatron-core")
            _run(model, job, bridge.model_bridge.vocab_size)
        if job.save:
            _tell("save with stock megatron-core")
            bridge.save_megatron_model(model, job.save)
        if job.generate is not None:
            _tell("generate")
            options = job.generate | {"vocab_size": bridge.model_bridge.vocab_size}
            for token in generate(model, job.tokens[0], **options):
                if dist.get_rank() == 0:
                    print(f"{TOKEN}{token}", flush=True)
    destroy_process_groups()


def _tell(step: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{STEP}{step}", flush=True)


def _run(model: list[Any], job: Job, vocab_size: int) -> None:
    """Write what this pipeline stage computes of the batch."""
    with hidden_states(model) as found:
        logits = forward(model, torch.tensor(job.tokens), vocab_size=vocab_size)
    if logits is not None:
        found[LOGITS] = logits.cpu()
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        states = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(states, Path(job.states or ".") / f"stage-{stage}.safetensors")
