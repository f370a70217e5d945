"""A user's script runs directly, with torchrun and with srun, without a GPU."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from transformers import Olmo2ForCausalLM

from megatron_olmo_bridge import synth

# Four lines build the model; the others save its logits.
SCRIPT = """
import json
import sys
import torch
import torch.distributed as dist
from megatron_olmo_bridge import AutoBridge

hf, out, tp, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])

provider = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
provider.tensor_model_parallel_size = tp
model = provider.provide_distributed_model(wrap_with_ddp=False)

input_ids = torch.tensor(tokens)
position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
may_not_look = torch.ones(1, 1, *2 * input_ids.shape[1:], dtype=torch.bool).triu(1)
with torch.no_grad():
    found = [model[0](input_ids, position_ids, mask) for mask in (None, may_not_look)]
torch.save(found, f"{out}/{dist.get_rank()}.pt")
"""
TOKENS = [[(7 * row + 13 * column * column) % 1000 for column in range(12)] for row in range(2)]
ON_THE_CPU = "no CUDA here: megatron-core runs on the CPU, on gloo"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_")


@dataclass
class Run:
    """Results of processes that were started together."""

    returncodes: list[int]
    stderr: str
    out: Path

    def logits(self) -> list[torch.Tensor]:
        """Logits without and with a mask, over the whole vocabulary."""
        assert set(self.returncodes) == {0}, self.stderr[-4000:]
        ranks = [torch.load(self.out / f"{i}.pt") for i in range(len(list(self.out.glob("*.pt"))))]
        return [torch.cat(parts, -1) for parts in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("olmo2-tiny", tmp_path_factory.mktemp("hf") / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def expected(hf: Path) -> torch.Tensor:
    with torch.no_grad():
        logits = Olmo2ForCausalLM.from_pretrained(hf)(torch.tensor(TOKENS)).logits
    assert logits.abs().max() > 1
    return logits


def start(launcher: list[str], hf: Path, folder: Path, tp: int, *tasks: dict[str, str]) -> Run:
    """Start the script with a launcher, once for each task's environment."""
    script, out = folder / "my_script.py", folder / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    env = {name: v for name, v in os.environ.items() if not name.startswith(LAUNCHER)}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [*launcher, str(script), str(hf), str(out), str(tp), json.dumps(TOKENS)]
    started = [
        subprocess.Popen(command, env=env | task, stderr=subprocess.PIPE, text=True)
        for task in tasks or ({},)
    ]
    try:
        said = [process.communicate(timeout=900)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return Run([process.returncode for process in started], "\n".join(said), out)


def assert_logits(run: Run, expected: torch.Tensor) -> None:
    without_mask, with_mask = run.logits()
    for found in (without_mask, with_mask):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5


def free_job() -> str:
    """Return a Slurm job id whose rendezvous port is free."""
    while True:
        job = random.randrange(10**6, 10**8)
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", 15000 + job % 15000))
            except OSError:
                continue
        return str(job)


def srun_tasks(count: int) -> list[dict[str, str]]:
    job = free_job()
    return [
        {
            "SLURM_STEP_NUM_TASKS": str(count),
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_JOB_ID": job,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def by_srun(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start([sys.executable], hf, tmp_path_factory.mktemp("srun"), 2, *srun_tasks(2))


@pytest.mark.slow
def test_one_process_without_torchrun(hf: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    run = start([sys.executable], hf, tmp_path, 1)
    assert_logits(run, expected)
    assert run.stderr.count(ON_THE_CPU) == 1


@pytest.mark.slow
def test_two_processes_of_torchrun(hf: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = start([sys.executable, *torchrun], hf, tmp_path, 2)
    assert_logits(run, expected)
    assert run.stderr.count(ON_THE_CPU) == 1


def test_two_tasks_of_srun(by_srun: Run, expected: torch.Tensor) -> None:
    assert_logits(by_srun, expected)


def test_one_task_of_srun_says_that_there_is_no_cuda(by_srun: Run) -> None:
    assert set(by_srun.returncodes) == {0}
    assert by_srun.stderr.count(ON_THE_CPU) == 1


@pytest.mark.slow
def test_too_few_processes_end_with_the_command_to_use(hf: Path, tmp_path: Path) -> None:
    run = start([sys.executable], hf, tmp_path, 2)
    assert run.returncodes != [0]
    last = " ".join(run.stderr.splitlines()[-2:])
    assert "takes 2 processes or a multiple of it, here is 1. Start it as:" in last
    assert f"torchrun --nproc_per_node 2 {tmp_path / 'my_script.py'} {hf}" in last
    assert not list(run.out.iterdir())
