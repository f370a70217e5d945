"""Live models in this very process, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU runtime, and the process groups of a single process as soon as a model is built."""
    from megatron_olmo_bridge.runtime.cpu import cpu_runtime
    from megatron_olmo_bridge.runtime.process_groups import destroy_process_groups

    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with cpu_runtime():
        yield
        destroy_process_groups()


@pytest.fixture
def build(one_process: None) -> Build:
    """Builds the model of a checkpoint, full of NaN: a value that is never set will show."""
    from megatron_olmo_bridge import AutoBridge

    def make(checkpoint: Path, *, wrap_with_ddp: bool = False, **fields: Any) -> Chunks:
        bridge = AutoBridge.from_hf_config(checkpoint)
        provider = bridge.to_megatron_provider(load_weights=False)
        for name, value in fields.items():
            assert hasattr(provider, name), name
            setattr(provider, name, value)
        chunks = provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(float("nan"))
        return chunks

    return make
