"""How fast is a training step here, next to a plain PyTorch loop around the transformers model?

Two processes, each with one model, take their steps in turn, so that noise hits both: this
package's loop on megatron-core; and forward, backward, clipping and AdamW. They have the same
weights, tokens and settings.

    python benchmarks/train.py --size tiny --rounds 5 --steps 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZES = {
    # config.json's differences from olmo2-tiny; sequences, micro-batch, tokens of a sequence
    "tiny": ({}, (8, 8, 256)),
    "100m": (
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "vocab_size": 16384,
        },
        (4, 4, 256),
    ),
}
LR, CLIP, DECAY = 3e-4, 1.0, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="that each takes in a round")
    options = parser.parse_args()
    for size in options.size or SIZES:
        measure(size, options.rounds, options.steps)


def measure(size: str, rounds: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side(side, size, Path(folder), (rounds + 1) * steps)
            for name, side in (("megatron", megatron_side), ("transformers", plain_side))
        }
        for side in sides.values():
            side.take(steps)  # warms up
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, float] = {}
        for _ in range(rounds):
            for name, side in sides.items():
                took, losses[name] = side.take(steps)
                seconds[name].append(took / steps)
        for side in sides.values():
            side.end()
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    tokens = SIZES[size][1][0] * SIZES[size][1][2]
    for name, took in seconds.items():
        middle = statistics.median(took)
        print(
            f"{size} {name}: {middle * 1e3:.0f} ms a step, {tokens / middle:,.0f} tokens/s, "
            f"loss {losses[name]:.5f}"
        )
    print(
        f"{size} ratio: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
        f"{rounds} rounds of {steps} steps)"
    )


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, run: Any, size: str, folder: Path, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run, args=(theirs, size, folder, steps))
        self.process.start()
        self.connection.recv()  # it is ready

    def take(self, steps: int) -> tuple[float, float]:
        self.connection.send(steps)
        return self.connection.recv()

    def end(self) -> None:
        self.connection.send(0)
        self.process.join()


def serve(connection: Connection, step: Any) -> None:
    """Take the steps that are asked for; answer with the seconds they took and the last loss."""
    connection.send("ready")
    while count := connection.recv():
        began = time.perf_counter()
        for _ in range(count):
            loss = step()
        connection.send((time.perf_counter() - began, loss))


def hf_folder(size: str, folder: Path) -> Path:
    """The model, with transformers' random weights; made by whoever comes first."""
    import torch
    from transformers import Olmo2Config, Olmo2ForCausalLM

    made = folder / size
    if not made.exists():
        from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge

        torch.manual_seed(0)
        config = Olmo2Bridge.sizes["olmo2-tiny"] | SIZES[size][0]
        Olmo2ForCausalLM(Olmo2Config(**config)).save_pretrained(made)
    return made


def batches(size: str, steps: int) -> Any:
    """Tokens [steps, sequences, sequence_length + 1]."""
    import torch

    sequences, _, length = SIZES[size][1]
    vocab = SIZES[size][0].get("vocab_size", 1024)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab, (steps, sequences, length + 1), generator=generator)


def plain_side(connection: Connection, size: str, folder: Path, steps: int) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf_folder(size, folder), dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    embedding = {"params": [model.get_input_embeddings().weight], "weight_decay": 0.0}
    others = [p for p in model.parameters() if p is not embedding["params"][0]]
    optimizer = torch.optim.AdamW(
        [embedding, {"params": others}], lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY
    )
    data, micro = iter(batches(size, steps)), SIZES[size][1][1]

    def step() -> float:
        optimizer.zero_grad()
        parts = next(data).split(micro)
        total = 0.0
        for part in parts:
            logits = model(part[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return total

    serve(connection, step)


def megatron_side(connection: Connection, size: str, folder: Path, steps: int) -> None:
    import warnings

    warnings.simplefilter("ignore")
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_olmo_bridge.tasks.language_modelling import LanguageModelling, with_model
    from megatron_olmo_bridge.training import config as c
    from megatron_olmo_bridge.training.loop import one_step
    from megatron_olmo_bridge.training.resolve import resolve
    from megatron_olmo_bridge.training.setup import started

    sequences, micro, length = SIZES[size][1]
    prefix = folder / f"{size}-data"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.zeros(sequences * length * steps + 1, dtype=torch.long))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    config = c.TrainingConfig(
        train=c.StepsConfig(steps, sequences, micro, length, "float32"),
        data=c.DataConfig([str(prefix)]),
        optimizer=c.OptimizerConfig(lr=LR, weight_decay=DECAY, clip_grad=CLIP),
        schedule=c.ScheduleConfig(decay="constant"),
        init=c.InitConfig(hf=str(hf_folder(size, folder))),
        logging=c.LoggingConfig(interval=steps + 1),
        parallel=c.ParallelConfig(distributed_optimizer=False),
    )
    resolved = resolve(*with_model(config), processes=1)
    with started(resolved, LanguageModelling.open, say=lambda line: None) as run:
        positions = torch.arange(length).expand(micro, -1)
        tokens = iter(
            {"tokens": part[:, :-1], "labels": part[:, 1:], "position_ids": positions}
            for batch in batches(size, steps)
            for part in batch.split(micro)
        )

        def step() -> float:
            record, _ = one_step(run, tokens)
            return record.loss

        serve(connection, step)


if __name__ == "__main__":
    main()
