"""Load two Hugging Face checkpoints with transformers and compare their logits bit for bit.

usage: python same_logits.py FIRST SECOND
"""

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

TOKENS = torch.arange(32).reshape(2, 16) * 31 % 1000


def logits(folder: str) -> torch.Tensor:
    """Logits [2, 16, vocabulary] of a fixed batch; refuses a checkpoint that doesn't fit."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    wrong = {k: v for k, v in report.items() if v and k.endswith("_keys")}
    if wrong:
        sys.exit(f"{folder}: transformers reports {wrong}")
    with torch.no_grad():
        return model(TOKENS).logits


def main() -> None:
    logging.disable_progress_bar()
    first, second = logits(sys.argv[1]), logits(sys.argv[2])
    if not torch.equal(first, second):
        sys.exit(f"The logits differ, by up to {(first - second).abs().max():g}.")
    print(
        f"No missing or unexpected tensor; {first.numel():,} logits are equal bit for bit "
        f"(largest magnitude {first.abs().max():.3f})."
    )


if __name__ == "__main__":
    main()
