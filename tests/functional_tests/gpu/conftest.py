"""Models on one GPU. Everything in this folder is skipped where that or Transformer Engine lacks.

Run it with ``pytest -m gpu``; with ``-s`` it prints errors, times and memory, and writes them as
JSON to the file that OLMO_BRIDGE_GPU_RESULTS names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Transformer Engine multiplies float32 matrices in TF32, and only this stops it. It has to be said
# before the CUDA libraries are loaded.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import pytest
import torch

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]
Record = Callable[..., None]

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Small, but of widths that the fused kernels take."""


def why_not() -> str | None:
    """Why these tests can't run here."""
    if not torch.cuda.is_available():
        return "needs CUDA, and there is none here"
    try:
        from megatron_olmo_bridge.nn.backends import why_no_transformer_engine
    except ImportError as error:
        return f"needs megatron-core: {error}"
    return why_no_transformer_engine()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def process_groups() -> Iterator[None]:
    """Those of a single process, which the first model sets up."""
    from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
            patch.delenv(name, raising=False)
        yield
    destroy_process_groups()


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in float32 with random norms, as transformers saves it. For reading only."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    model = Olmo2ForCausalLM(Olmo2Config(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("gpu") / "float32"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_bfloat16(hf: Path) -> Path:
    """The same model, rounded to bfloat16."""
    from transformers import Olmo2ForCausalLM

    folder = hf.parent / "bfloat16"
    Olmo2ForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """A batch, 2 x 256."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, CONFIG["vocab_size"], (2, 256), generator=generator).cuda()


@pytest.fixture
def build() -> Build:
    """A live model of a checkpoint of either kind, filled, by a backend."""
    from megatron_olmo_bridge import AutoBridge

    def make(checkpoint: Path, backend: str, **fields: Any) -> Chunks:
        provider = AutoBridge.from_checkpoint(checkpoint).to_megatron_provider()
        provider.backend = backend
        for name, value in fields.items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=False)

    return make


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """Print a measurement, and keep it for the file of results."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }

    def add(name: str, **values: Any) -> None:
        found[name] = values
        print(f"\n{name}: {json.dumps(values)}")

    yield add
    if path := os.environ.get("OLMO_BRIDGE_GPU_RESULTS"):
        Path(path).write_text(json.dumps(found, indent=2) + "\n")
