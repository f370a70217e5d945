"""The command ``olmo-bridge``."""

from .app import main

__all__ = ["main"]
