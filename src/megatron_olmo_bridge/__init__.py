"""Move OLMo checkpoints between Hugging Face and Megatron, and prove nothing was lost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import install_hint
from .runtime.te_import import look_before_megatron_core

if TYPE_CHECKING:
    from megatron_olmo_bridge.tools.doctor import doctor
    from megatron_olmo_bridge.tools.inspect import inspect
    from megatron_olmo_bridge.tools.synth import synth
    from megatron_olmo_bridge.tools.verify import verify

    from .convert.average import average_checkpoints
    from .convert.to_hf import export_checkpoint
    from .convert.to_megatron import import_checkpoint
    from .data.prepare import prepare_data
    from .live.auto_bridge import AutoBridge
    from .live.strategy import hf_as_megatron
    from .models.olmo2.provider import (
        Olmo2ModelProvider,
        Olmo2ModelProvider1B,
        Olmo2ModelProvider7B,
        Olmo2ModelProvider13B,
        Olmo2ModelProvider32B,
    )
    from .tasks.train import train

_HOME = {
    "AutoBridge": "live.auto_bridge",
    "Olmo2ModelProvider": "models.olmo2.provider",
    "Olmo2ModelProvider13B": "models.olmo2.provider",
    "Olmo2ModelProvider1B": "models.olmo2.provider",
    "Olmo2ModelProvider32B": "models.olmo2.provider",
    "Olmo2ModelProvider7B": "models.olmo2.provider",
    "average_checkpoints": "convert.average",
    "doctor": "tools.doctor",
    "export_checkpoint": "convert.to_hf",
    "hf_as_megatron": "live.strategy",
    "import_checkpoint": "convert.to_megatron",
    "inspect": "tools.inspect",
    "prepare_data": "data.prepare",
    "synth": "tools.synth",
    "train": "tasks.train",
    "verify": "tools.verify",
}

__all__ = [
    "AutoBridge",
    "Olmo2ModelProvider",
    "Olmo2ModelProvider1B",
    "Olmo2ModelProvider7B",
    "Olmo2ModelProvider13B",
    "Olmo2ModelProvider32B",
    "__version__",
    "average_checkpoints",
    "doctor",
    "export_checkpoint",
    "hf_as_megatron",
    "import_checkpoint",
    "inspect",
    "prepare_data",
    "synth",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package costs nothing.
    if name in _HOME:
        try:
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in (
                "megatron",
                "transformers",
            ):
                raise
            raise ImportError(f"{name} needs megatron-core: {install_hint('megatron')}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


look_before_megatron_core()
