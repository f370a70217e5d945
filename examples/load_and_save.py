"""Load a Hugging Face checkpoint into a live Megatron model, and write that in both formats.

usage: python load_and_save.py HF OUT
       torchrun --nproc_per_node 4 load_and_save.py HF OUT --tp 2 --pp 2

Each process reads only the rows that contain its part of the model.
"""

import argparse
from pathlib import Path

import torch.distributed as dist

from megatron_olmo_bridge import AutoBridge


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("hf")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    args = parser.parse_args()

    bridge = AutoBridge.from_hf_pretrained(args.hf)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = args.tp
    provider.pipeline_model_parallel_size = args.pp
    model = provider.provide_distributed_model(wrap_with_ddp=False)

    # Weights one at a time, as a trainer hands them to an inference engine; all processes iterate.
    largest, elements = "", 0
    for name, tensor in bridge.export_hf_weights(model):
        if tensor.numel() > elements:
            largest, elements = name, tensor.numel()
    if dist.get_rank() == 0:
        print(f"largest tensor: {largest}, {elements:,} elements")

    bridge.save_hf_pretrained(model, args.out / "hf")
    bridge.save_megatron_model(model, args.out / "megatron")


# megatron-core's writer starts processes that import this file again: the guard is needed.
if __name__ == "__main__":
    main()
