"""Move OLMo checkpoints between Hugging Face and Megatron, and prove nothing was lost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .convert.doctor import doctor
    from .convert.inspect import inspect
    from .convert.synth import synth
    from .convert.to_hf import export_checkpoint
    from .convert.to_megatron import import_checkpoint
    from .convert.verify import verify

_HOME = {
    "doctor": "convert.doctor",
    "export_checkpoint": "convert.to_hf",
    "import_checkpoint": "convert.to_megatron",
    "inspect": "convert.inspect",
    "synth": "convert.synth",
    "verify": "convert.verify",
}

__all__ = [
    "__version__",
    "doctor",
    "export_checkpoint",
    "import_checkpoint",
    "inspect",
    "synth",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package costs nothing.
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
