"""Transformer Engine's own Python, on a CPU: ``make test-te``.

TRANSFORMER_ENGINE_PYTHON names the folder that ``pip install --target`` put its pure Python wheel
into. Without it nothing in this folder is collected: with stubs in the place of the compiled parts,
a process is of no use for any other test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = os.environ.get("TRANSFORMER_ENGINE_PYTHON")
collect_ignore_glob = [] if FOLDER else ["test_*.py"]

if FOLDER:
    import te_extension

    te_extension.import_transformer_engine(Path(FOLDER).resolve())

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]


@pytest.fixture(scope="session", autouse=True)
def runtime() -> Iterator[None]:
    """megatron-core on the CPU, and an H100 that Transformer Engine alone sees."""
    from megatron.core.transformer.moe import moe_utils

    from megatron_olmo_bridge.nn import backends
    from megatron_olmo_bridge.runtime.cpu import cpu_runtime

    with pytest.MonkeyPatch.context() as patch, cpu_runtime():
        # What torch would compile runs as it is written; sorting and routing are kernels alone.
        patch.setattr(torch._dynamo.config, "disable", True)
        for name in ("fused_permute", "fused_topk_with_score_function"):
            patch.setattr(moe_utils, name, None)
        for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
            patch.delenv(name, raising=False)
        patch.setattr(backends, "why_no_transformer_engine", lambda: None)
        with te_extension.gpu_for_transformer_engine():
            yield


@pytest.fixture(autouse=True)
def process_groups() -> Iterator[None]:
    """Those of a single process, which the first model sets up."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups

    yield
    destroy_process_groups()
    # megatron-core's global: a scalar after a bare backward pass, of shape [1] in training.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A Hugging Face folder of a tiny model, made once. For reading only."""
    from megatron_olmo_bridge import synth

    made: dict[tuple[Any, ...], Path] = {}

    def make(size: str, dtype: str = "float32") -> Path:
        if (size, dtype) not in made:
            folder = tmp_path_factory.mktemp(size) / dtype
            made[size, dtype] = synth(size, folder, dtype=dtype)
        return made[size, dtype]

    return make


@pytest.fixture
def build() -> Build:
    """A live model of a Hugging Face folder, filled, in one chunk and not wrapped for training."""
    from megatron_olmo_bridge import AutoBridge

    def make(hf: Path, backend: str = "transformer_engine", **fields: Any) -> Chunks:
        provider = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
        provider.backend = backend
        for name, value in fields.items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=False)

    return make
