"""Processes and their GPUs: arithmetic, too many of them, and how they wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from launching import olmo_bridge
from megatron.core import parallel_state

from megatron_olmo_bridge.inference.jobs import LOGITS, Job, read_states
from megatron_olmo_bridge.live.auto_bridge import AutoBridge
from megatron_olmo_bridge.runtime import process_groups
from megatron_olmo_bridge.runtime.process_groups import on_first


def test_float32_of_started_processes_is_not_tf32(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this process's environment says. In TF32 they differ by some 1e-3."""
    from transformers import AutoModelForCausalLM

    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    tokens = [[(7 * i) % 1000 for i in range(64)]]
    Job(str(hf), dtype="float32", tokens=tokens, states=str(tmp_path)).run()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits
    assert (read_states(tmp_path)[LOGITS] - expected).abs().max() <= 1e-4


def test_more_processes_than_gpus_are_refused(hf: Path) -> None:
    count = torch.cuda.device_count() + 1
    refused = olmo_bridge("compare", hf, hf, "--tp", count)
    assert refused.exit_code == 2
    assert "processes were started on this machine" in refused.output


def test_other_ranks_wait_on_gloo(hf: Path) -> None:
    provider = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
    provider.provide_distributed_model(wrap_with_ddp=False)
    assert torch.distributed.get_backend() == "nccl"
    assert parallel_state.model_parallel_is_initialized()
    assert on_first(lambda: 7) == 7
    assert torch.distributed.get_backend(process_groups._waiting_group()) == "gloo"


def test_tests_without_the_marker_see_no_gpu() -> None:
    """Run the repository's own suite on this machine."""
    root = Path(__file__).parents[3]
    test = "tests/unit_tests/runtime/test_devices.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", test], cwd=root)
    assert done.returncode == 0
