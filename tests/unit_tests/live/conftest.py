"""Live models in this very process, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Chunks = list[torch.nn.Module]
Build = Callable[..., Chunks]


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
