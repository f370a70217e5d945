"""Start a module of this package as one process or as several, and bring back what went wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from megatron_olmo_bridge import errors
from megatron_olmo_bridge.errors import BridgeError, ProcessError

_ERROR_FILE = "OLMO_BRIDGE_ERROR_FILE"
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAST_LINES = 15
_NO_MORE = "\0\n"
"""Ends what a process prints."""


@contextlib.contextmanager
def processes(
    module: str,
    arguments: Sequence[str],
    count: int,
    *,
    stoppable: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Iterator[str]]:
    """Run ``python -m module`` in so many processes, by torchrun if more than one.

    They share the cores that torch may use.

    Args:
        stoppable: they know what to do on SIGTERM. Then SIGTERM, Ctrl-C and the end of the terminal
            don't end this process, but are handed on to them as SIGTERM.
        environment: variables for them, in place of those of this process.

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
        env |= environment or {}
        env[_ERROR_FILE] = str(error_file)
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        with (Path(folder) / "stderr").open("w+") as stderr:
            end, pipe = os.pipe()
            process = subprocess.Popen(
                command, stdout=pipe, stderr=stderr, text=True, env=env,
                start_new_session=stoppable,  # else Ctrl-C would reach torchrun too
            )  # fmt: skip
            watch = threading.Thread(target=_end_the_lines, args=(process, pipe), daemon=True)
            watch.start()
            lines = _lines(end)
            try:
                with _handing_on(process) if stoppable else contextlib.nullcontext():
                    yield lines
            except BaseException:
                process.terminate()
                raise
            finally:
                for _ in lines:  # a full pipe would hold it up
                    pass
                process.wait()
            if process.returncode:
                stderr.seek(0)
                raise _error(error_file, stderr.read(), process.returncode)


def _end_the_lines(process: subprocess.Popen[str], pipe: int) -> None:
    """Say that no more comes when a process has ended, for its pipe may stay open: a helper of
    megatron-core's outlives a worker that is killed."""
    process.wait()
    os.write(pipe, _NO_MORE.encode())
    os.close(pipe)


def _lines(pipe: int) -> Iterator[str]:
    with os.fdopen(pipe) as output:
        for line in output:
            text, no_more, _ = line.partition(_NO_MORE)
            if text:
                yield text
            if no_more:
                return


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
