"""Take one training step on the CPU with stock Megatron-LM (``megatron.training``).

    megatron_training_step.py CHECKPOINT_ROOT --tokens JSON --out ROOT -- FLAGS...

Does what ``pretrain`` does, with Megatron-LM's own functions: parse arguments, build model and
optimizer, load the checkpoint, take one step, save a checkpoint. Only datasets, timers and logging
are left out. FLAGS are as for ``megatron_training_load.py``.

The parameters are NaN before the load. The checkpoint of iteration 1 is saved into ROOT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from megatron_training_load import MACHINE_FLAGS, initialize
from stock_megatron import no_strides

from megatron_olmo_bridge.runtime.cpu import cpu_runtime


def step_flags(tokens: list[list[int]]) -> list[str]:
    """Return flags for one step on all tokens with the AdamW of ``stock_megatron.py``."""
    options = {
        "micro-batch-size": len(tokens),
        "global-batch-size": len(tokens),
        "train-iters": 1,
        "save-interval": 1,
        "lr": 1e-2,
        "min-lr": 1e-3,
        "lr-decay-iters": 100,
        "lr-decay-style": "cosine",
        "weight-decay": 0.1,
        "clip-grad": 1.0,
    }
    return ["--exit-on-missing-checkpoint", *(f"--{k}={v}" for k, v in options.items())]


@contextlib.contextmanager
def no_streams() -> Iterator[None]:
    """Replace the CUDA stream on which ``get_model`` wraps the model in DDP."""
    with (
        patch("torch.cuda.Stream", Mock()),
        patch("torch.cuda.current_stream", Mock()),
        patch("torch.cuda.stream", lambda _: contextlib.nullcontext()),
    ):
        yield


def train(flags: list[str], tokens: torch.Tensor) -> None:
    """Load a checkpoint, take one step on ``tokens`` [b, s], save a checkpoint."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.training import setup_model_and_optimizer, train_step

    args = initialize(flags)

    def provide(pre_process: bool, post_process: bool, pg_collection: Any, **_: Any) -> Any:
        builder = GPTModelBuilder(gpt_config_from_args(args))
        model = builder.build_model(pg_collection, pre_process, post_process)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        return model

    def forward_step(batches: Any, model: Any) -> Any:
        batch = next(batches)
        positions = torch.arange(batch.shape[1]).expand_as(batch)
        later = torch.triu(torch.ones(batch.shape[1], batch.shape[1], dtype=torch.bool), 1)
        losses = model(batch, positions, later[None, None], labels=batch.roll(-1, dims=1))
        return losses, lambda losses: (losses.mean(), {"lm loss": losses.detach().mean()})

    with no_streams():
        model, optimizer, scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, provide
        )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    for chunk in model:
        chunk.train()
    losses, skipped, *_ = train_step(
        forward_step,
        RerunDataIterator(iter([tokens])),
        model,
        optimizer,
        scheduler,
        config,
        get_forward_backward_func(),
        iteration=args.iteration,
    )
    assert not skipped
    print(f"loss {float(losses['lm loss']):.6f}")
    save_checkpoint(args.iteration + 1, model, optimizer, scheduler, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint_root", type=Path)
    parser.add_argument("--tokens", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    end = sys.argv.index("--")  # FLAGS have options that look like this script's
    options, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    flags += ["--load", str(options.checkpoint_root), "--save", str(options.out)]
    with cpu_runtime(), no_strides():
        train(flags + MACHINE_FLAGS + step_flags(options.tokens), torch.tensor(options.tokens))
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
