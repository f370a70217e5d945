"""Transformer Engine's Python without its compiled parts, on a machine without CUDA.

Transformer Engine's pure Python wheel holds everything but three compiled things: its C++ extension
``transformer_engine_torch``, Triton's kernels, and the ONNX exporter that it imports at the top.
Stubs stand for these, and :mod:`te_kernels` gives the few functions of the extension that the
models call their arithmetic, in PyTorch. What runs is Transformer Engine's own code: constructors,
``forward``, autograd functions, the choice of an attention backend, extra states, ``FusedAdam``.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from te_kernels import KERNELS, fused_attention

EXTENSION = "transformer_engine_torch"
_OTHER_STUBS = (
    "triton",
    "triton.language",
    "triton.language.core",
    "triton.language.standard",
    "onnx",
    "onnx.defs",
    "onnxscript",
    "onnx_ir",
)
_DTYPES = (
    "kByte",
    "kInt32",
    "kFloat32",
    "kFloat16",
    "kBFloat16",
    "kFloat8E4M3",
    "kFloat8E5M2",
    "kFloat4E2M1",
)
"""Source: ``DType`` of transformer_engine/pytorch/constants.py, in this order."""


class _Stub(types.ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def import_transformer_engine(folder: Path) -> None:
    """Import ``transformer_engine.pytorch`` from a folder that its pure Python wheel is in."""
    assert EXTENSION not in sys.modules, "a compiled Transformer Engine is here: leave it alone"
    # These look for Triton; they must not find the stub.
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch._inductor.runtime.hints")
    sys.path.insert(0, str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # else it looks for CUDA's libraries
    sys.modules[EXTENSION] = _extension(folder)
    for name in _OTHER_STUBS:
        sys.modules[name] = _Stub(name)
    sys.modules["triton"].__version__ = "3.4.0"  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        importlib.import_module("transformer_engine.pytorch")
    attention = "transformer_engine.pytorch.attention.dot_product_attention.backends"
    importlib.import_module(attention).FusedAttention.forward = fused_attention
    for name in _OTHER_STUBS:
        del sys.modules[name]


def _extension(folder: Path) -> _Stub:
    """The stub of the C++ extension: what Transformer Engine asks of it when it is imported."""
    extension = _Stub(EXTENSION)
    extension.DType = enum.IntEnum("DType", _DTYPES, start=0)
    # 2.20 insists on exactly its backends; 2.6 has one more.
    more = {} if "class FusedAttnBackend" in _fused_attn(folder) else {"NVTE_F16_max512_seqlen": 0}
    backends = {"NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2, "NVTE_No_Backend": -1}
    extension.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends | more)
    for kernel in KERNELS:
        setattr(extension, kernel.__name__, kernel)
    return extension


def _fused_attn(folder: Path) -> str:
    return (folder / "transformer_engine/pytorch/cpp_extensions/fused_attn.py").read_text()


def _called_by_transformer_engine() -> bool:
    """Return whether the caller of the calling function is Transformer Engine's code."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("transformer_engine")


@contextlib.contextmanager
def gpu_for_transformer_engine() -> Any:
    """Transformer Engine's code, and no other, finds an H100; its tensors are on the CPU."""
    h100 = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    replaced = {
        (torch.cuda, "is_available"): lambda: _called_by_transformer_engine(),
        (torch.cuda, "device_count"): lambda: int(_called_by_transformer_engine()),
        (torch.cuda, "get_device_properties"): lambda device=None: h100,
        (torch.cuda, "get_device_capability"): lambda device=None: (h100.major, h100.minor),
        (torch.cuda, "is_current_stream_capturing"): lambda: False,
        (torch.cuda, "device"): lambda device: contextlib.nullcontext(),
        (torch.cuda, "Stream"): MagicMock,
        (torch.cuda, "stream"): lambda stream: contextlib.nullcontext(),
        (torch.cuda, "Event"): MagicMock,
        (torch.cuda.nvtx, "range_push"): lambda message: None,
        (torch.cuda.nvtx, "range_pop"): lambda: None,
    }
    before = {key: getattr(*key) for key in replaced}
    is_cuda = torch.Tensor.is_cuda
    for (owner, name), value in replaced.items():
        setattr(owner, name, value)
    torch.Tensor.is_cuda = property(lambda tensor: _called_by_transformer_engine())
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)
        torch.Tensor.is_cuda = is_cuda
