"""Run the command, and start the scripts in this folder as real processes."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from typer.testing import CliRunner, Result

from megatron_olmo_bridge.cli.app import app

HERE = Path(__file__).parent
TOKENS = [[(7 * row + 13 * column * column) % 1000 for column in range(16)] for row in range(2)]
"""A fixed batch [2, 16] of token ids below 1000."""


@functools.cache
def warm() -> subprocess.Popen[str]:
    """Start the process that forks all others; it exits with this one, which closes its input."""
    command = [sys.executable, str(HERE / "warm.py")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_script(
    name: str, *arguments: object, processes: int = 1, environment: dict[str, str] | None = None
) -> str:
    """Run a script in one or more processes, as torchrun would; return what they printed."""
    codes, said = ended(name, *arguments, processes=processes, environment=environment)
    if any(codes):
        raise AssertionError(f"{name} ended with {codes}:\n{said[-8000:]}")
    return said


def ended(
    name: str, *arguments: object, processes: int = 1, environment: dict[str, str] | None = None
) -> tuple[list[int], str]:
    """Run a script that may fail; return its processes' exit codes and what they printed."""
    server = warm()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        job = {
            "script": name,
            "arguments": [str(a) for a in arguments],
            "processes": processes,
            "environment": environment or {},
            "log": str(log),
            "folder": str(Path.cwd()),
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return codes, log.read_text()


def stock(action: str, *arguments: object, processes: int = 1) -> str:
    """Run ``stock_megatron.py``."""
    return run_script("stock_megatron", action, *arguments, processes=processes)


def olmo_bridge(*arguments: object) -> Result:
    """Run a command in this process; processes that it starts are real."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def tokens_argument() -> str:
    return json.dumps(TOKENS)


def with_hub(
    cwd: Path, url: str, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process that finds the hub at ``url``."""
    environment = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cwd / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    } | environment
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-m", "megatron_olmo_bridge", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=900
    )


@contextlib.contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP from this process; yield the server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
