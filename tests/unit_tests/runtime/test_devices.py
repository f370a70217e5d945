"""Which GPU a process takes, decided by numbers and variables alone."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.runtime.devices import NO_TF32, gpu_of, tf32_notice


def torchrun(rank: int, processes: int) -> dict[str, str]:
    return {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}


def srun(rank: int) -> dict[str, str]:
    """After ``add_slurm``: srun doesn't say how many tasks a node has."""
    return {"LOCAL_RANK": str(rank), "SLURM_LOCALID": str(rank)}


@pytest.mark.parametrize(
    ("device_count", "env", "index"),
    [
        (0, {}, None),
        (0, torchrun(3, 4), None),
        (1, {}, 0),
        (8, {}, 0),
        (4, torchrun(3, 4), 3),
        (8, torchrun(3, 4), 3),
        (4, srun(3), 3),
        (1, srun(0), 0),
        (1, srun(3), 0),  # each task sees its own GPU alone
    ],
)
def test_the_gpu_of_a_process(device_count: int, env: dict[str, str], index: int | None) -> None:
    assert gpu_of(device_count, env) == index


@pytest.mark.parametrize(
    ("device_count", "env", "says"),
    [
        (1, torchrun(0, 2), "at least 2 processes .*, and 1 GPU is visible.* at most 1 here"),
        (1, torchrun(1, 2), "at least 2 processes .*, and 1 GPU is visible"),
        (2, torchrun(0, 4), "at least 4 processes .*, and 2 GPUs are visible.* at most 2 here"),
        (2, srun(2), "at least 3 processes .*, and 2 GPUs are visible"),
        # torchrun in a batch step, which srun's variables are of
        (1, torchrun(1, 2) | {"SLURM_LOCALID": "0"}, "1 GPU is visible"),
    ],
)
def test_more_processes_than_gpus(device_count: int, env: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=f"{says}.*CUDA_VISIBLE_DEVICES= before the command"):
        gpu_of(device_count, env)


def test_float32_in_tf32_is_said() -> None:
    notice = tf32_notice("float32", transformer_engine=True, env={})
    assert notice is not None and "NVIDIA_TF32_OVERRIDE=0" in notice
    assert tf32_notice("float32", transformer_engine=True, env=NO_TF32) is None
    assert tf32_notice("float32", transformer_engine=False, env={}) is None
    assert tf32_notice("bfloat16", transformer_engine=True, env={}) is None


def test_tests_see_no_gpu() -> None:
    """But those of ``pytest -m gpu``: the others are written for the CPU runtime."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0
