"""Carrying out a plan: how its files are divided."""

import random

import pytest

from megatron_olmo_bridge.storage.execute import share
from megatron_olmo_bridge.storage.plan import OutputFile


def files(sizes: list[int]) -> list[OutputFile]:
    return [OutputFile(f"f{i:03d}", size, ()) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_file_goes_to_one_and_the_bytes_are_even(seed: int, count: int) -> None:
    rng = random.Random(seed)
    all_files = files([rng.randrange(100) for _ in range(rng.randrange(30))])
    shares = share(all_files, count)
    assert len(shares) == count
    assert sorted((f for s in shares for f in s), key=lambda f: f.name) == all_files
    sizes = [sum(f.size for f in s) for s in shares]
    # Nobody has more than anybody else by more than one file.
    assert max(sizes) - min(sizes) <= max((f.size for f in all_files), default=0)
    assert all(s == sorted(s, key=lambda f: f.name) for s in shares)


def test_every_process_shares_out_alike() -> None:
    all_files = files([5, 5, 5, 5, 1])
    assert share(all_files, 3) == share(reversed(all_files), 3)
