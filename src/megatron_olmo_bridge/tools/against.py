"""Check a checkpoint's weights against a fingerprint, or against the hashes of its blocks."""

from __future__ import annotations

import math
import random
import secrets
from dataclasses import dataclass
from pathlib import Path

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, ReadOptions
from megatron_olmo_bridge.checkpoints.differences import Difference, name_differences
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import InputError, MappingError, quote
from megatron_olmo_bridge.storage.fetch import connections
from megatron_olmo_bridge.storage.fingerprint import (
    BlockOf,
    HashedTensor,
    blocks_of,
    hash_blocks,
    hash_tensors,
    is_fingerprint,
    read_leaves,
    root_of,
)
from megatron_olmo_bridge.storage.hub import locate
from megatron_olmo_bridge.storage.plan import WORKERS
from megatron_olmo_bridge.storage.progress import Reporter

from .verify import Verification


@dataclass(frozen=True, kw_only=True)
class ExpectedWeights:
    """What a checkpoint's weights are compared with: a fingerprint, its leaves, or both."""

    fingerprint: str | None = None
    """Compare the weights with this fingerprint; with --against, its leaves."""
    against: str | Path | None = None
    """Compare each block of the weights with the hashes in FILE, which fingerprint --leaves
    wrote."""
    sample: int | None = None
    """Check only N blocks of --against, chosen at random."""
    seed: int | None = None
    """Seed of the choice, to repeat it. Default: one that cannot be foreseen."""

    @property
    def is_given(self) -> bool:
        """Whether any of them is set."""
        return self != ExpectedWeights()

    def check(self) -> None:
        """Raise InputError if the values are not valid, or contradict each other."""
        if not self.is_given:
            raise InputError("nothing to compare with: name a fingerprint, or a file of leaves")
        if self.fingerprint is not None and not is_fingerprint(self.fingerprint):
            raise InputError(
                f"--fingerprint {quote(self.fingerprint)}: is not 64 digits of 0-9 and a-f"
            )
        if self.sample is not None and self.against is None:
            raise InputError("--sample needs --against FILE: the hashes to compare blocks with")
        if self.sample is not None and self.sample < 1:
            raise InputError(f"--sample {self.sample}: check at least one block")
        if self.seed is not None and self.sample is None:
            raise InputError("--seed needs --sample N: it chooses the blocks")

    def leaves(self) -> dict[str, HashedTensor]:
        """Return the tensors of ``against`` by name; their fingerprint is the expected one."""
        assert self.against is not None
        file = Path(self.against).expanduser()
        tensors = read_leaves(file)
        if self.fingerprint not in (None, root := root_of(tensors)):
            raise InputError(f"{file}: are leaves of {root}, not of {self.fingerprint}")
        return {tensor.name: tensor for tensor in tensors}


@dataclass(frozen=True)
class Sample:
    """A random sample of blocks, and what it would have found."""

    blocks: int
    """Number of blocks that were checked."""
    total: int
    """Number of blocks of the checkpoint."""
    seed: int
    """Seed that chose them."""
    finds_one_changed: float
    """Probability of finding a difference if a single block is changed."""
    changed_for_99_percent: int
    """Smallest number of changed blocks for which this probability is at least 99 %."""


def detection_probability(sample: int, total: int, changed: int) -> float:
    """Return the probability that a sample of blocks has at least one of the ``changed`` ones.

    It is drawn without replacement, so the probability of none is hypergeometric:
    C(total - changed, sample) / C(total, sample).
    """
    return 1 - math.prod((total - sample - i) / (total - i) for i in range(changed))


def changed_blocks_found(sample: int, total: int, probability: float) -> int:
    """Return the smallest number of changed blocks of which a sample of blocks has at least one
    with this probability, below 1."""
    missed, changed = 1.0, 0
    while missed > 1 - probability:
        missed *= (total - sample - changed) / (total - changed)
        changed += 1
    return changed


@dataclass(frozen=True)
class WeightVerification(Verification):
    """Result of a comparison of weights with a fingerprint or its leaves."""

    sample: Sample | None = None
    """The sample, if not all blocks were checked."""


def verify_against(
    path: str | Path,
    expected: ExpectedWeights,
    options: ReadOptions | None = None,
    *,
    workers: int = WORKERS,
    reporter: Reporter | None = None,
) -> WeightVerification:
    """Compare a checkpoint's weights with a fingerprint, or with the hashes of its blocks.

    Args:
        path: path, address or hub id of a checkpoint of any kind.
        expected: what to compare with. Only its leaves tell which blocks differ.
        options: facts that the checkpoint may not record.
        workers: number of threads. Each holds a few MiB of a tensor.
        reporter: receives progress.

    Raises:
        InputError: ``expected`` contradicts itself.
        FormatError: the file of leaves is damaged.
        BridgeError: the path is not a checkpoint, is damaged, or changed meanwhile.
    """
    reporter, options = reporter or Reporter(), options or ReadOptions()
    expected.check()
    leaves = expected.leaves() if expected.against is not None else None
    try:
        found = locate(path, connections=options.max_connections)
        checkpoint = open_checkpoint(found, options, strict=False)
    except MappingError as error:
        return WeightVerification([Difference("mapping", str(path), str(error))], 0, 0)
    workers = max(workers, connections([found]))
    if leaves is None:
        result = _compare_root(checkpoint, str(expected.fingerprint), workers, reporter)
    else:
        result = _compare_blocks(checkpoint, leaves, expected, workers, reporter)
    reporter.end()
    checkpoint.snapshot.check_unchanged()
    return result


def _compare_root(
    checkpoint: Checkpoint, expected: str, workers: int, reporter: Reporter
) -> WeightVerification:
    views = checkpoint.tensors.values()
    total = sum(view.nbytes for view in views)
    reporter.begin("fingerprinting", total)
    root = root_of(hash_tensors(views, workers, reporter))
    detail = f"is {root}, expected {expected}"
    differences = [Difference("fingerprint", "weights", detail)] if root != expected else []
    return WeightVerification(differences, len(views), total, checked="fingerprint")


def _compare_blocks(
    checkpoint: Checkpoint,
    leaves: dict[str, HashedTensor],
    expected: ExpectedWeights,
    workers: int,
    reporter: Reporter,
) -> WeightVerification:
    differences = list(name_differences(checkpoint.tensors, leaves))
    differing = {difference.name for difference in differences}
    views = [view for name, view in checkpoint.tensors.items() if name not in differing]
    blocks, sample = _sample([b for view in views for b in blocks_of(view)], expected)
    nbytes = sum(block.end - block.begin for block in blocks)
    reporter.begin("verifying", nbytes)
    hashes = hash_blocks(blocks, workers, reporter)
    for block, found in zip(blocks, hashes, strict=True):
        if found != leaves[block.tensor.name].blocks[block.number]:
            detail = f"block {block.number}, bytes {block.begin:,} to {block.end - 1:,}"
            differences.append(Difference("values", block.tensor.name, detail))
    return WeightVerification(differences, len(blocks), nbytes, checked="blocks", sample=sample)


def _sample(
    blocks: list[BlockOf], expected: ExpectedWeights
) -> tuple[list[BlockOf], Sample | None]:
    """Return the blocks to check, in the order of the checkpoint; with a description if these are
    not all."""
    total = len(blocks)
    if expected.sample is None or expected.sample >= total:
        return blocks, None
    size, seed = expected.sample, expected.seed
    seed = secrets.randbits(32) if seed is None else seed
    chosen = sorted(random.Random(seed).sample(range(total), size))
    one, many = detection_probability(size, total, 1), changed_blocks_found(size, total, 0.99)
    return [blocks[i] for i in chosen], Sample(size, total, seed, one, many)
