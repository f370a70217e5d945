"""What is said of attention's kernels, by Transformer Engine's own choice; and of a Transformer
Engine without its compiled parts, which must not break anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_runs import TRACKER, Place
from transformer_engine.pytorch.attention.dot_product_attention import utils

from megatron_olmo_bridge.models import attention_kernels as module
from megatron_olmo_bridge.models.attention_kernels import attention_kernels


@pytest.fixture(autouse=True)
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_no_transformer_engine", lambda: None)


def test_each_family_and_each_kind_of_layer_has_a_kernel() -> None:
    """In the stub of the extension, cuDNN has a kernel for all."""
    fused = "cuDNN's fused attention (backend 1)"
    assert [(kernel.layers, kernel.kernel) for kernel in attention_kernels()] == [
        ("heads of 128", fused),  # OLMo-2
        ("heads of 128", fused),  # OLMo-3
        ("heads of 128, window of 4096", fused),
        ("heads of 128", fused),  # OLMo
        ("heads of 128", fused),  # OLMoE
        ("heads of 128", fused),  # FlexOlmo
        ("heads of 64", fused),  # GPT-2
    ]


def test_without_the_cudnn_kernel_attention_is_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    kernels = {kernel.kernel for kernel in attention_kernels()}
    assert kernels == {"Transformer Engine's unfused attention"}


def test_doctor_says_when_the_kernel_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "get_attention_backend", lambda params: SimpleNamespace().missing)
    assert all(kernel.kernel.startswith("not known: ") for kernel in attention_kernels())


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process that has nothing of Transformer Engine but its Python, and no stubs."""
    folder = str(Path(os.environ["TRANSFORMER_ENGINE_PYTHON"]).resolve())
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_megatron_core_alone_fails_with_a_broken_transformer_engine() -> None:
    """Else the next test proves nothing."""
    done = run("-c", "import megatron.core")
    if done.returncode == 0:
        pytest.skip("this version says it by an ImportError, which megatron-core expects")
    assert "transformer_engine" in done.stderr


def test_training_and_doctor_work_with_a_broken_transformer_engine(
    tmp_path: Path,
) -> None:
    Place.made(tmp_path)
    recipe, save = str(tmp_path / "olmo2.py"), f"checkpoint.save={tmp_path / 'run'}"
    done = run("-m", "megatron_olmo_bridge", "train", recipe, save, "train.steps=5")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / TRACKER).read_text() == "5"
    done = run("-m", "megatron_olmo_bridge", "doctor")
    assert done.returncode == 0, done.stderr
    assert "Transformer Engine needs CUDA" in " ".join(done.stdout.split())
