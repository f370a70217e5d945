"""Run ``olmo-bridge prepare-data`` and stop it (SIGSTOP) when the first part is finished and its
workers are alive, until SIGCONT: ``prepare_stopped.py OUT SOURCE ...``."""

import os
import signal
import sys
from pathlib import Path


def main(out: str, *arguments: str) -> None:
    # Not at the top: workers are spawned, so they import this file too.
    from megatron_olmo_bridge.cli.app import app
    from megatron_olmo_bridge.cli.data import _TokenBar

    show_tokens, stopped = _TokenBar.tokens, False

    def stop(bar: _TokenBar, count: int) -> None:
        nonlocal stopped
        show_tokens(bar, count)
        if not stopped and any(Path(f"{out}.partial").glob("part-*.json")):
            stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)

    _TokenBar.tokens = stop  # type: ignore[method-assign]
    app(["prepare-data", *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
