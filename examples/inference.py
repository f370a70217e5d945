"""Logits and greedy generation with a live Megatron model, on one process or several.

usage: python inference.py CKPT 1,2,3
       torchrun --nproc_per_node 2 inference.py CKPT 1,2,3 --tp 2

CKPT is a Hugging Face folder or a Megatron checkpoint; 1,2,3 are token ids.
"""

import argparse

import torch
import torch.distributed as dist

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.inference.generate import generate


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("tokens")
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()
    prompt = [int(token) for token in args.tokens.split(",")]

    bridge = AutoBridge.from_checkpoint(args.checkpoint)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = args.tp
    model = provider.provide_distributed_model(wrap_with_ddp=False)

    # Called directly, the model returns this rank's part of the vocabulary. None: causal mask.
    input_ids = torch.tensor([prompt], device=torch.cuda.current_device())
    position_ids = torch.arange(len(prompt), device=input_ids.device).unsqueeze(0)
    with torch.no_grad():
        logits = model[0](input_ids, position_ids, None)
    print(f"rank {dist.get_rank()}: logits {list(logits.shape)}", flush=True)

    tokens = generate(model, prompt, vocab_size=bridge.model_bridge.vocab_size, max_new_tokens=16)
    generated = list(tokens)  # all processes take part in each token
    if dist.get_rank() == 0:
        print("continued:", *generated)


if __name__ == "__main__":
    main()
