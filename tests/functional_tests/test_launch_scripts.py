"""Launch scripts of ``recipes/launch``: real torchrun, and stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = "olmo2_tiny"
ON_A_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def script(name: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPES / "launch" / name), *map(str, arguments)]
    environment = os.environ | {"PATH": ON_A_PATH} | env
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Environment whose ``srun`` and ``scontrol`` print their arguments; srun exits with
    SRUN_CODE."""
    for name in ("srun", "scontrol"):
        command = tmp_path / name
        exits = "exit $SRUN_CODE" if name == "srun" else ""
        command.write_text(f'#!/bin/sh\necho {name} "$@"\n{exits}\n')
        command.chmod(0o755)
    return {"PATH": f"{tmp_path}{os.pathsep}{ON_A_PATH}", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_without_a_recipe_the_scripts_print_help(name: str) -> None:
    done = script(name)
    assert done.returncode == 2
    assert "torchrun.sh olmo2_7b" in done.stdout or "usage: sbatch" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_the_command() -> None:
    done = script("torchrun.sh", TINY, "--dry-run", "--json", NPROC_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["estimate"]["parameters"] == 1_050_496


def test_torchrun_on_several_machines_asks_which_this_is() -> None:
    done = script("torchrun.sh", TINY, NNODES="2")
    assert done.returncode != 0
    assert "which machine this is" in done.stderr


@pytest.mark.parametrize(("code", "queued"), [(0, False), (1, False), (75, True)])
def test_a_stopped_job_requeues_itself(slurm: dict[str, str], code: int, queued: bool) -> None:
    done = script("slurm.sbatch", TINY, "train.steps=5", SRUN_CODE=str(code), **slurm)
    assert done.returncode == code
    assert f"-m megatron_olmo_bridge train {TINY} train.steps=5" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) is queued
