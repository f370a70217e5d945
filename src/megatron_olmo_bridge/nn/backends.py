"""Two sets of modules to build layers from: Transformer Engine's and plain PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.runtime import te_import

from .attention import ScaledDotProductAttention
from .layer_norm import LayerNorm
from .post_norm import RMSNorm, RowParallelLinearPostLN
from .qk_norm import KRMSNorm, QRMSNorm, WideningKRMSNorm, WideningQRMSNorm

AUTO, LOCAL, TRANSFORMER_ENGINE = "auto", "local", "transformer_engine"


@dataclass(frozen=True)
class Backend:
    """Modules of a layer spec, as megatron-core's specs take them."""

    column_parallel_linear: Any
    row_parallel_linear: Any
    row_parallel_linear_post_norm: Any
    core_attention: Any
    q_norm: Any
    k_norm: Any
    norm: Any
    """RMSNorm."""
    layer_norm: Any
    transformer_engine: bool
    """True for Transformer Engine's modules."""


def backend_named(name: str = AUTO) -> Backend:
    """Return the modules of a backend; ``auto`` takes Transformer Engine where it can be used.

    Raises:
        InputError: the backend is unknown, or Transformer Engine can't be used.
    """
    if name not in (AUTO, LOCAL, TRANSFORMER_ENGINE):
        raise InputError(f"backend {name!r} is none of {AUTO}, {TRANSFORMER_ENGINE}, {LOCAL}")
    why_not = why_no_transformer_engine()
    if name == TRANSFORMER_ENGINE and why_not:
        raise InputError(f"backend {name!r} can't be used: {why_not}. Use {LOCAL!r}.")
    if name == LOCAL or why_not:
        return Backend(
            column_parallel_linear=ColumnParallelLinear,
            row_parallel_linear=RowParallelLinear,
            row_parallel_linear_post_norm=RowParallelLinearPostLN,
            core_attention=ScaledDotProductAttention,
            q_norm=WideningQRMSNorm,
            k_norm=WideningKRMSNorm,
            norm=RMSNorm,
            layer_norm=LayerNorm,
            transformer_engine=False,
        )
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    from .te_modules import MaskedTEDotProductAttention, TERowParallelLinearPostLN

    return Backend(
        column_parallel_linear=TEColumnParallelLinear,
        row_parallel_linear=TERowParallelLinear,
        row_parallel_linear_post_norm=TERowParallelLinearPostLN,
        core_attention=MaskedTEDotProductAttention,
        q_norm=QRMSNorm,
        k_norm=KRMSNorm,
        norm=TENorm,
        layer_norm=TENorm,
        transformer_engine=True,
    )


@cache
def why_no_transformer_engine() -> str | None:
    """Return why Transformer Engine's modules can't be built here; None where they can."""
    if reason := te_import.why_no_transformer_engine():
        return reason
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return None if HAVE_TE else "megatron-core can't use the Transformer Engine that is installed"
