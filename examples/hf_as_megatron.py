"""Stock megatron-core loads a Hugging Face folder as if it were its own checkpoint.

usage: python hf_as_megatron.py HF      or by torchrun, with --tp N

Nothing is converted: this is for code that calls dist_checkpointing.load already.
"""

import argparse

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_olmo_bridge import AutoBridge, hf_as_megatron


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("hf")
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()

    provider = AutoBridge.from_hf_pretrained(args.hf).to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = args.tp
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)

    with hf_as_megatron(args.hf) as (folder, strategy):
        state = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, folder, sharded_strategy=strategy
        )
    model.load_state_dict(state["model"])
    print(f"rank {dist.get_rank()}: {len(state['model'])} entries loaded", flush=True)


if __name__ == "__main__":
    main()
