"""A stand-in for Transformer Engine on one CPU process: its constructors, plain PyTorch inside.

With it megatron-core takes Transformer Engine for installed, and builds its own ``TELinear``,
``TENorm`` and ``TEDotProductAttention`` on what stands here. Arguments that Transformer Engine
doesn't have are refused, as is what no model of these tests should ask for. Whatever else
megatron-core imports from the package is an empty class or module.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

__version__ = "2.20.2"


class WithExtraState(torch.nn.Module):
    """All of its modules have one; without fp8 it is an empty tensor."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0


class Linear(WithExtraState):
    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Any = None, rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None, bias: bool = True,
        return_bias: bool = False, params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None, parameters_split: Any = None, device: Any = "cuda",
        ub_name: str | None = None, delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None, save_original_input: bool = False,
        name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert parallel_mode in ("row", "column")
        assert (tp_size, sequence_parallel, bias, return_bias) == (1, False, False, False)
        assert init_method is not None
        self.in_features, self.out_features = in_features, out_features
        self.tp_size, self.use_bias, self.parallel_mode = tp_size, bias, parallel_mode
        weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
        init_method(weight)
        self.weight = torch.nn.Parameter(weight)
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = int(parallel_mode == "row")  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(inp, self.weight)


class RMSNorm(WithExtraState):
    def __init__(
        self, normalized_shape: int | None = None, eps: float = 1e-5,
        sequence_parallel: bool | None = None, params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False, hidden_size: int | None = None, *, device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None)
        assert not zero_centered_gamma
        self.eps = eps
        width = normalized_shape or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.rms_norm(
            x.float(), self.weight.shape, self.weight.float(), self.eps
        )
        return wide.to(x.dtype)


class DotProductAttention(WithExtraState):
    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, attn_mask_type: str = "causal",
        sequence_parallel: bool = False, tp_size: int = 1, get_rng_state_tracker: Any = None,
        tp_group: Any = None, layer_number: int | None = None, attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert attn_mask_type == "causal"
        assert num_gqa_groups is not None
        assert num_attention_heads % num_gqa_groups == 0

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None = None, *, attn_mask_type: str,
    ) -> torch.Tensor:  # fmt: skip
        assert query.dtype is key.dtype is value.dtype
        causal = attn_mask_type == "causal"
        # Its causal mask begins at the top left: not for cached keys. One query needs none.
        assert len(query) == len(key) if causal else (attn_mask_type, len(query)) == ("no_mask", 1)
        heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=causal and len(query) > 1, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def apply_rotary_pos_emb(
    t: torch.Tensor, freqs: torch.Tensor, tensor_format: str, interleaved: bool, fused: bool
) -> torch.Tensor:
    """The fused kernel: sines and cosines in float32."""
    assert (freqs.dtype, tensor_format, interleaved, fused) == (torch.float32, "sbhd", False, True)
    wide = t.float()
    first, second = wide.chunk(2, -1)
    turned = wide * freqs.cos() + torch.cat([-second, first], -1) * freqs.sin()
    return turned.to(t.dtype)


def get_cpu_offload_context(
    enabled: bool, *unused: Any, **neither: Any
) -> tuple[Any, Callable[[Any], Any]]:
    """Asked for in any case; only offloading would do anything."""
    assert not enabled
    return contextlib.nullcontext(), lambda x: x


class _SplitAlongDim:
    @staticmethod
    def apply(x: torch.Tensor, dim: int, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        return torch.split(x, sizes, dim)


STANDING_IN = {
    value.__name__: value
    for value in (Linear, RMSNorm, DotProductAttention, apply_rotary_pos_emb,
                  get_cpu_offload_context, _SplitAlongDim)
}  # fmt: skip


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in STANDING_IN:
            return STANDING_IN[name]
        if name[0].isupper():
            return type(name, (), {})
        return importlib.import_module(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Finder())
from . import common, pytorch  # noqa: E402, F401
