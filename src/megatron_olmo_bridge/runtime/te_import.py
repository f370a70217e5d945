"""Keep a Transformer Engine that cannot be used from breaking megatron-core.

megatron-core imports Transformer Engine wherever it is installed, and expects nothing but an
ImportError if that fails. Wheels of different versions (AssertionError), a missing CUDA library
(OSError) or the meta package alone (RuntimeError) make ``import megatron.core`` fail; and without a
GPU, one that can be imported gives megatron-core optimizers that run on GPUs only. So this module
hides an unusable Transformer Engine before megatron-core is imported.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TRANSFORMER_ENGINE = "transformer_engine"
NO_CUDA = "Transformer Engine needs CUDA, and there is none here"
_DISTRIBUTIONS = (
    "transformer-engine",
    "transformer-engine-torch",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
)
_hidden: str | None = None
"""Reason for hiding Transformer Engine; None if it isn't hidden."""


def why_no_transformer_engine() -> str | None:
    """Import Transformer Engine; return why it cannot be used here, or None if it can."""
    if _hidden is not None:
        return _hidden
    if find_spec(TRANSFORMER_ENGINE) is None:
        return "Transformer Engine is not installed"
    import torch

    if not torch.cuda.is_available():
        return NO_CUDA
    try:
        importlib.import_module(f"{TRANSFORMER_ENGINE}.pytorch")
    except Exception as error:  # any kind: see above
        return f"Transformer Engine can't be imported: {_summary(error)}{_versions_that_differ()}"
    return None


def _summary(error: Exception) -> str:
    """Return the first lines of an error's message, or its class name if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _versions_that_differ() -> str:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if len(set(found.values())) < 2:
        return ""
    names = ", ".join(f"{name} {number}" for name, number in found.items())
    return f" (installed are {names}: install one version of all)"


def hide_unusable_transformer_engine() -> None:
    """Make ``import transformer_engine`` raise ModuleNotFoundError where it cannot be used.

    Do nothing if it is imported already. Warn if CUDA is available, since speed is lost.
    """
    global _hidden
    if TRANSFORMER_ENGINE in sys.modules or find_spec(TRANSFORMER_ENGINE) is None:
        return
    _hidden = why_no_transformer_engine()
    if _hidden is None:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == TRANSFORMER_ENGINE]:
        del sys.modules[name]
    sys.modules[TRANSFORMER_ENGINE] = None  # type: ignore[assignment]
    if _hidden != NO_CUDA:
        logging.getLogger(__name__).warning(
            "%s. Models are made of PyTorch's modules, which are slower.", _hidden
        )


class _BeforeMegatronCore:
    """Import hook that finds nothing; it runs when megatron-core is about to be imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name == "megatron.core":
            sys.meta_path.remove(_BeforeMegatronCore)
            hide_unusable_transformer_engine()


def look_before_megatron_core() -> None:
    """Have :func:`hide_unusable_transformer_engine` called when megatron-core is first imported."""
    if "megatron.core" not in sys.modules and _BeforeMegatronCore not in sys.meta_path:
        sys.meta_path.insert(0, _BeforeMegatronCore)
