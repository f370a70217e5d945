"""What is fused only where Transformer Engine is, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import CudaGraphScope

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.models.fusions import refuse_unsupported

FIELDS = {field.name for field in fields(TransformerConfig)}
FUSED = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
)
SIZES = [name for name in published_sizes() if name.endswith("-tiny")]


def provider(size: str, **more: Any) -> Any:
    bridge = published_sizes()[size]
    return bridge(dict(bridge.sizes[size])).provider(backend="local", **more)


@pytest.mark.parametrize("size", SIZES)
def test_the_local_backend_fuses_nothing(size: str) -> None:
    local = provider(size)
    local.finalize()
    assert not any(getattr(local, name) for name in FUSED)


@pytest.mark.parametrize("size", SIZES)
def test_a_plain_provider_is_not_refused(size: str) -> None:
    plain = provider(size)
    for _ in range(2):  # what megatron-core derives is not refused either
        plain.finalize()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_cuda_graph", True),
        ("external_cuda_graph", True),
        ("cuda_graph_impl", "local"),
        ("cuda_graph_impl", "transformer_engine"),
        ("cuda_graph_impl", "full_iteration"),
        ("cuda_graph_scope", "attn"),
        ("cuda_graph_scope", ["mlp"]),
        ("cuda_graph_scope", CudaGraphScope.full_iteration),
        ("cuda_graph_modules", ["attn"]),
        ("inference_cuda_graph_scope", "layer"),
        ("tp_comm_overlap", True),
    ],
)
def test_cuda_graphs_and_overlap_with_tensor_parallelism_are_refused(name: str, value: Any) -> None:
    if name not in FIELDS:
        pytest.skip("this version of megatron-core has no such field")
    refused = provider("olmo2-tiny")
    setattr(refused, name, value)
    with pytest.raises(UnsupportedError, match=name):
        refused.finalize()
    with pytest.raises(UnsupportedError, match=name):
        refuse_unsupported(refused)
