"""Logging for ``--verbose`` and ``--log-file``, by the package's own logger."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import escape

PACKAGES = (
    "torch",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "megatron-core",
    "transformer-engine",
)
"""Packages whose versions are logged."""
_LOG = logging.getLogger("megatron_olmo_bridge")


class _Formatter(logging.Formatter):
    """Formatter that escapes control characters, which names in a checkpoint may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record), keep="\n\t")


@contextlib.contextmanager
def logging_to(verbose: bool, file: Path | None) -> Iterator[None]:
    """Log a command to standard error (if ``verbose``) and, in full detail, to a file.

    The file is appended to. Under torchrun all processes share it; each line has its rank.
    """
    handlers: list[logging.Handler] = []
    if verbose:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[0].setLevel(logging.INFO)
        handlers[0].setFormatter(_Formatter("%(message)s"))
    if file is not None:
        rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(
            _Formatter(f"%(asctime)s{rank} %(levelname)s %(name)s: %(message)s")
        )
    before = _LOG.level
    if handlers:
        _LOG.setLevel(logging.DEBUG if file is not None else logging.INFO)
    for handler in handlers:
        _LOG.addHandler(handler)
    begin = time.monotonic()
    try:
        _log_environment()
        yield
        _LOG.info("done in %.2f s", time.monotonic() - begin)
    except BaseException as error:
        _LOG.info("ended after %.2f s by %s", time.monotonic() - begin, type(error).__name__)
        _LOG.debug("where it happened:", exc_info=error)
        raise
    finally:
        for handler in handlers:
            _LOG.removeHandler(handler)
            handler.close()
        _LOG.setLevel(before)


def _log_environment() -> None:
    if not _LOG.isEnabledFor(logging.INFO):  # looking up versions is slow
        return
    _LOG.info("olmo-bridge %s: %s", __version__, " ".join(sys.argv[1:]))
    _LOG.info("Python %s, %s", platform.python_version(), platform.platform())
    _LOG.info("%s", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
