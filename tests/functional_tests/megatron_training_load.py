"""Load a checkpoint with stock Megatron-LM (``megatron.training``) on the CPU, and save its logits.

    python megatron_training_load.py CHECKPOINT_ROOT --logits OUT.pt -- FLAGS...

FLAGS are what a user pastes from ``olmo-bridge inspect --megatron-args``. Needs a megatron-core
whose wheel carries ``megatron.training`` (0.19, Python 3.12). For several processes run it with
``torchrun``, CUDA_DEVICE_MAX_CONNECTIONS=1 and a parallel layout among FLAGS.

The parameters are NaN before the load, so that a parameter that isn't loaded shows. OUT.pt gets
``tokens`` [2, 16] and ``logits`` [2, 16, padded vocabulary].
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_olmo_bridge.runtime.cpu import cpu_runtime

MACHINE_FLAGS = [
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--distributed-backend",
    "gloo",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
]
"""Flags for a CPU without Apex (the first two), Transformer Engine, and a C++ compiler."""

TEST_FLAGS = ["--micro-batch-size", "2", "--exit-on-missing-checkpoint"]
"""A batch size, which Megatron-LM requires, and an error for a missing checkpoint."""


def fixed_tokens(vocab_size: int) -> torch.Tensor:
    """Return the same tokens [2, 16] in every run."""
    return torch.randint(0, vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))


def initialize(flags: list[str]) -> argparse.Namespace:
    """Do what Megatron-LM's ``pretrain`` does before it builds a model; returns its args."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    sys.argv = [sys.argv[0], *flags]
    # Asked of the GPU's driver under tensor parallelism. 9: CUDA_DEVICE_MAX_CONNECTIONS is checked.
    with patch("megatron.training.arguments.get_device_arch_version", return_value=9):
        args = parse_and_validate_args()
    if args.pipeline_model_parallel_size > 1:
        raise SystemExit("this test runs the whole model in each process: no pipeline stages")

    # initialize_megatron makes process groups only where it counts GPUs.
    # One process alone needs no port, which could clash with another run's.
    alone = None if "RANK" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=alone, rank=args.rank, world_size=args.world_size)
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
    initialize_megatron(allow_no_cuda=True, skip_mpu_initialization=True)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    return args


def load_and_run(flags: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what Megatron-LM's ``pretrain`` does up to the first batch; return tokens and logits."""
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    args = initialize(flags)
    # As get_model() and the model provider of pretrain_gpt.py; DDP doesn't matter to a load.
    model_config = gpt_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(model_config).build_model(groups)
    if args.bf16 or args.fp16:
        model = Float16Module(model_config.transformer, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))

    load_checkpoint([model], optimizer=None, opt_param_scheduler=None, strict=True)

    lost = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if lost:
        raise SystemExit(f"not loaded, or only in part: {', '.join(lost)}")
    tokens = fixed_tokens(args.vocab_size)
    positions = torch.arange(16).expand(2, -1)
    later = torch.triu(torch.ones(16, 16, dtype=torch.bool), 1)[None, None]
    model.eval()
    with torch.no_grad():
        local_logits = model(tokens, positions, later)
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(local_logits)
    return tokens, logits.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint_root", type=Path)
    parser.add_argument("--logits", type=Path, required=True)
    # Split off FLAGS before argparse: they have options that look like this script's.
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    flags += ["--load", str(options.checkpoint_root), *MACHINE_FLAGS, *TEST_FLAGS]
    with cpu_runtime():
        tokens, logits = load_and_run(flags)
        if dist.get_rank() == 0:
            torch.save({"tokens": tokens, "logits": logits}, options.logits)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
