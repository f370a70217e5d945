"""Start a module of this package as one process or as several, and bring back what went wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from megatron_olmo_bridge import errors
from megatron_olmo_bridge.errors import BridgeError, ProcessError

_ERROR_FILE = "OLMO_BRIDGE_ERROR_FILE"
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAST_LINES = 15


@contextlib.contextmanager
def processes(
    module: str, arguments: Sequence[str], count: int, *, stoppable: bool = False
) -> Iterator[IO[str]]:
    """Run ``python -m module`` in so many processes, by torchrun if more than one.

    They share the cores that torch may use.

    Args:
        stoppable: they know what to do on SIGTERM. Then SIGTERM, Ctrl-C and the end of the terminal
            don't end this process, but are handed on to them as SIGTERM.

    Yields:
        What they print, line by line. On leaving, they are waited for.

    Raises:
        BridgeError: the one that a process ended with (see :func:`reporting_errors`).
        ProcessError: a process died otherwise; has the last lines that it said.
    """
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["-m", module, *arguments]
    with tempfile.TemporaryDirectory(prefix="olmo-bridge-") as folder:
        error_file = Path(folder) / "error"
        env = {k: v for k, v in os.environ.items() if k not in _OF_TORCHRUN}
        env[_ERROR_FILE] = str(error_file)
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        with (Path(folder) / "stderr").open("w+") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env,
                start_new_session=stoppable,  # else Ctrl-C would reach torchrun too
            )  # fmt: skip
            assert process.stdout is not None
            try:
                with _handing_on(process) if stoppable else contextlib.nullcontext():
                    yield process.stdout
            except BaseException:
                process.terminate()
                raise
            finally:
                process.communicate()
            if process.returncode:
                stderr.seek(0)
                raise _error(error_file, stderr.read(), process.returncode)


@contextlib.contextmanager
def _handing_on(process: subprocess.Popen[str]) -> Iterator[None]:
    def hand_on(number: int, frame: FrameType | None) -> None:
        process.terminate()

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _error(error_file: Path, said: str, code: int) -> BridgeError:
    if error_file.exists():
        kind, _, message = error_file.read_text().partition(":")
        return getattr(errors, kind, BridgeError)(message)
    last = "\n".join(said.strip().splitlines()[-_LAST_LINES:])
    return ProcessError(f"a process ended with exit code {code}; its last lines:\n{last}")


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """In a started process: hand an error of this package over to the one that started it.

    In any other process it is raised.
    """
    try:
        yield
    except BridgeError as error:
        path = os.environ.get(_ERROR_FILE)
        if path is None:
            raise
        Path(path).write_text(f"{type(error).__name__}:{error}")
        sys.exit(error.exit_code)
