"""Relative difference of each weight of two checkpoints."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf, isnan

import torch

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.formats.tensors import MeanView
from megatron_olmo_bridge.storage.plan import WORKERS
from megatron_olmo_bridge.storage.transfer import Transfer


@dataclass(frozen=True)
class WeightDifference:
    """Difference between two checkpoints' values of one weight."""

    name: str
    """Hugging Face name."""
    relative: float
    """Frobenius norm of the difference, divided by that of the reference; 0 if all values are
    equal (NaN equals NaN), NaN if it can't be computed because of a NaN."""


def weight_differences(reference: Checkpoint, model: Checkpoint) -> list[WeightDifference]:
    """Compare the weights that both checkpoints have, as float32, a few MiB at a time."""

    def compare(name: str) -> WeightDifference:
        expected, actual = (
            MeanView.of([(1.0, checkpoint.tensors[name])], "float32")
            for checkpoint in (reference, model)
        )
        difference = norm = 0.0
        with Transfer() as left, Transfer() as right:
            for (_, _, a), (_, _, b) in zip(
                left.blocks(expected), right.blocks(actual), strict=True
            ):
                x, y = (torch.frombuffer(block, dtype=torch.float32).double() for block in (a, b))
                apart = (x - y).masked_fill_((x == y) | (x.isnan() & y.isnan()), 0)
                difference += float(apart.square().sum())
                norm += float(x.square().sum())
        if not difference:
            return WeightDifference(name, 0.0)
        return WeightDifference(name, (difference / norm) ** 0.5 if norm else inf)

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(compare, (n for n in reference.tensors if n in model.tensors)))


def severity(relative: float) -> float:
    """Return the sorting key of a relative difference: NaN is the largest."""
    return inf if isnan(relative) else relative


def summarize(weights: list[WeightDifference]) -> str:
    """Return in one line how many weights differ, and which of them most."""
    differing = [w for w in weights if w.relative]
    if not differing:
        return f"all {len(weights)} are equal"
    largest = max(differing, key=lambda w: severity(w.relative))
    return (
        f"{len(differing)} of {len(weights)} differ, most {largest.name}: "
        f"relative difference {largest.relative:.2g}"
    )
