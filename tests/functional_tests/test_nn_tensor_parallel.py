"""Norms and cross entropy on several gloo processes equal those of one, forward and backward."""

import pytest

pytest.importorskip("megatron.core")

from launching import run_script


@pytest.mark.parametrize("check", ["qk_norm", "post_norm", "post_norm_sequence_parallel"])
def test_two_ranks_compute_the_same_as_one(check: str) -> None:
    run_script("nn_on_two_ranks", check, processes=2)


@pytest.mark.parametrize("processes", [2, 3])
def test_cross_entropy_of_a_sharded_vocabulary(processes: int) -> None:
    """The last of three ranks has only padding rows of the vocabulary."""
    run_script("nn_on_two_ranks", "cross_entropy", processes=processes)
