"""The ``olmo-bridge`` command."""

import sys

from megatron_olmo_bridge.errors import INTERRUPTED


def main() -> None:
    """Run the command line."""
    try:
        from .app import app  # slow enough that Ctrl-C can arrive during the import

        app()
    except KeyboardInterrupt:
        sys.stderr.write("olmo-bridge: interrupted.\n")
        sys.exit(INTERRUPTED)
