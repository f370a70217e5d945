"""The command ``olmo-bridge``."""

import sys

from megatron_olmo_bridge.errors import INTERRUPTED


def main() -> None:
    """Run the command line."""
    try:
        from .app import app  # takes a moment, in which Ctrl-C is no fault either

        app()
    except KeyboardInterrupt:
        sys.stderr.write("olmo-bridge: interrupted.\n")
        sys.exit(INTERRUPTED)
