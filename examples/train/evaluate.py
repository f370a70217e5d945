"""Does transformers find the loss that the trainer found? And was more learned than word counts?

    python examples/train/evaluate.py RUN HF --below 1.1

RUN is the folder of a finished run (``checkpoint.save``), HF what was exported from it. The loss of
HF is computed by transformers alone, on the sequences that the trainer evaluated on. Start it where
the run was started: RUN/run.yaml names the data as it was named then.

The unigram entropy is the loss of guessing each token by how often it is in the training data:
the mean of -ln((count + 1) / (all + vocabulary)) over the same tokens.

Exits with 1 unless both losses agree to 1e-4 and are below the unigram entropy and ``--below``.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron_olmo_bridge.data.info import DataInfo
from megatron_olmo_bridge.training.monitor.history import RunHistory
from megatron_olmo_bridge.training.recipes import from_dict
from megatron_olmo_bridge.training.token_data import TokenData

TOLERANCE = 1e-4
"""Largest allowed difference between the two losses, in nats per token."""


def held_out(data: TokenData, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and, as labels, the tokens after them; both [sequences, sequence_length]."""
    samples = [data.validation[i] for i in range(sequences)]
    return torch.stack([s["tokens"] for s in samples]), torch.stack([s["labels"] for s in samples])


def loss_in_transformers(hf: Path, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross entropy, in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype="auto")
    total = 0.0
    with torch.no_grad():
        for inputs, targets in zip(tokens.split(16), labels.split(16), strict=True):
            logits = model(inputs).logits.float()
            total += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / labels.numel()


def unigram_entropy(training: list[DataInfo], vocabulary: int, labels: torch.Tensor) -> float:
    """Cross entropy of predicting each token by its frequency in training, in nats per token."""
    counts = np.zeros(vocabulary)
    for info in training:
        tokens = np.fromfile(f"{info.prefix}.bin", dtype=info.dtype)
        counts += np.bincount(tokens, minlength=vocabulary)
    logs = np.log((counts + 1) / (counts.sum() + vocabulary))
    return float(-logs[labels.numpy()].mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("hf", type=Path)
    parser.add_argument("--below", type=float, default=math.inf, help="stated loss")
    args = parser.parse_args()
    logging.disable_progress_bar()

    config = from_dict(yaml.safe_load((args.run / "run.yaml").read_text()))
    vocabulary = config.model["vocab_size"]
    data = TokenData.open(config, vocabulary)
    tokens, labels = held_out(data, config.evaluation.batches * config.train.global_batch_size)
    trainer = RunHistory.read(args.run).evaluations[-1]["loss"]
    exported = loss_in_transformers(args.hf, tokens, labels)
    unigram = unigram_entropy(data.info[: len(config.data.path)], vocabulary, labels)

    print(f"{f'{labels.numel():,} held-out tokens':33}  nats a token   perplexity")
    for name, loss in (
        ("guessing among all tokens alike", math.log(vocabulary)),
        ("unigram entropy", unigram),
        ("the trainer, in megatron-core", trainer),
        ("the export, in transformers", exported),
    ):
        print(f"{name:33} {loss:13.6f} {math.exp(loss):12.2f}")
    apart = abs(exported - trainer)
    if apart >= TOLERANCE:
        sys.exit(f"The two losses differ by {apart:.2e}.")
    if exported >= min(unigram, args.below):
        sys.exit(f"The loss is not below {min(unigram, args.below):.6g}.")
    print(f"The two losses differ by {apart:.1e}; {unigram - exported:.2f} nats below unigrams.")


if __name__ == "__main__":
    main()
