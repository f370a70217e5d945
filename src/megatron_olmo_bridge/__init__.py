"""Move OLMo checkpoints between Hugging Face and Megatron, and prove nothing was lost."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .errors import install_hint
from .runtime.te_import import look_before_megatron_core

if TYPE_CHECKING:  # for type checkers, which can't follow the tables below
    from .checkpoints.checkpoint import ReadOptions as ReadOptions
    from .convert.average import average_checkpoints as average_checkpoints
    from .convert.options import AverageOptions as AverageOptions
    from .convert.options import ExportOptions as ExportOptions
    from .convert.options import ImportOptions as ImportOptions
    from .convert.to_hf import export_checkpoint as export_checkpoint
    from .convert.to_megatron import import_checkpoint as import_checkpoint
    from .data.options import PrepareOptions as PrepareOptions
    from .data.prepare import prepare_data as prepare_data
    from .errors import BridgeError as BridgeError
    from .inference.compare import compare as compare
    from .inference.generate import generate as generate
    from .live.auto_bridge import AutoBridge as AutoBridge
    from .live.strategy import hf_as_megatron as hf_as_megatron
    from .models.olmo2.provider import Olmo2ModelProvider as Olmo2ModelProvider
    from .models.olmo2.provider import Olmo2ModelProvider1B as Olmo2ModelProvider1B
    from .models.olmo2.provider import Olmo2ModelProvider7B as Olmo2ModelProvider7B
    from .models.olmo2.provider import Olmo2ModelProvider13B as Olmo2ModelProvider13B
    from .models.olmo2.provider import Olmo2ModelProvider32B as Olmo2ModelProvider32B
    from .storage.execute import WriteOptions as WriteOptions
    from .tasks.train import train as train
    from .tools.against import ExpectedWeights as ExpectedWeights
    from .tools.against import verify_against as verify_against
    from .tools.doctor import doctor as doctor
    from .tools.fingerprint import fingerprint as fingerprint
    from .tools.inspect import inspect as inspect
    from .tools.synth import synth as synth
    from .tools.verify import verify as verify
    from .training.config import TrainingConfig as TrainingConfig

_OFFLINE = {
    "AverageOptions": "convert.options",
    "BridgeError": "errors",
    "ExpectedWeights": "tools.against",
    "ExportOptions": "convert.options",
    "ImportOptions": "convert.options",
    "PrepareOptions": "data.options",
    "ReadOptions": "checkpoints.checkpoint",
    "TrainingConfig": "training.config",
    "WriteOptions": "storage.execute",
    "average_checkpoints": "convert.average",
    "doctor": "tools.doctor",
    "export_checkpoint": "convert.to_hf",
    "fingerprint": "tools.fingerprint",
    "import_checkpoint": "convert.to_megatron",
    "inspect": "tools.inspect",
    "prepare_data": "data.prepare",
    "synth": "tools.synth",
    "verify": "tools.verify",
    "verify_against": "tools.against",
}
"""Module of each public name that needs no megatron-core."""

_WITH_MEGATRON = {
    "AutoBridge": "live.auto_bridge",
    "Olmo2ModelProvider": "models.olmo2.provider",
    "Olmo2ModelProvider1B": "models.olmo2.provider",
    "Olmo2ModelProvider7B": "models.olmo2.provider",
    "Olmo2ModelProvider13B": "models.olmo2.provider",
    "Olmo2ModelProvider32B": "models.olmo2.provider",
    "compare": "inference.compare",
    "generate": "inference.generate",
    "hf_as_megatron": "live.strategy",
    "train": "tasks.train",
}
"""Module of each public name that needs megatron-core."""

__all__ = ["__version__", *_OFFLINE, *_WITH_MEGATRON]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package costs nothing.
    if name in _WITH_MEGATRON and not _has_megatron():
        raise ImportError(f"{name} needs megatron-core: {install_hint('megatron')}")
    module = _OFFLINE.get(name) or _WITH_MEGATRON.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    # help() loads each of these, and would stop at one that can't be loaded.
    return __all__ if _has_megatron() else ["__version__", *_OFFLINE]


def _has_megatron() -> bool:
    """Return whether the extra ``megatron`` is installed."""
    return bool(find_spec("megatron") and find_spec("transformers"))


look_before_megatron_core()
