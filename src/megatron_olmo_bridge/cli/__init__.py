"""The command ``olmo-bridge``."""

import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


def main() -> None:
    """Run the command line."""
    try:
        from .app import app  # takes a moment, in which Ctrl-C is no fault either

        app()
    except KeyboardInterrupt:
        sys.stderr.write("olmo-bridge: interrupted.\n")
        sys.exit(INTERRUPTED)
