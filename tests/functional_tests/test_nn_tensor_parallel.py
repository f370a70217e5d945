"""The norms on two gloo processes: what one process computes, forward and backward."""

import pytest

pytest.importorskip("megatron.core")

from launching import run_script


@pytest.mark.parametrize("check", ["qk_norm", "post_norm", "post_norm_sequence_parallel"])
def test_two_ranks_compute_what_one_does(check: str) -> None:
    run_script("nn_on_two_ranks", check, processes=2)
