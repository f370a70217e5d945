"""Run a module of this package in one or more processes, and re-raise their errors."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from megatron_olmo_bridge import errors
from megatron_olmo_bridge.errors import BridgeError, ProcessError

_ERROR_FILE = "OLMO_BRIDGE_ERROR_FILE"
_LAST_LINES = 15
_GRACE = 30.0
"""Seconds to wait, after one process failed, for the others to handle SIGTERM."""
_NO_MORE = "\0\n"
"""End marker of the processes' output."""


@contextlib.contextmanager
def processes(
    module: str,
    arguments: Sequence[str],
    count: int,
    *,
    stoppable: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Iterator[str]]:
    """Run ``python -m module`` in ``count`` processes, which connect as under torchrun.

    They split the cores that torch may use. Neither they nor their helper processes outlive this
    context or this process.

    Args:
        stoppable: the processes handle SIGTERM. SIGTERM, Ctrl-C and the end of the terminal then
            don't end this process, but are forwarded to them as SIGTERM.
        environment: variables that override those of this process.

    Yields:
        Their output, line by line. On exit, wait for them; if the caller's code raises, end them.

    Raises:
        BridgeError: the one that a process ended with (see :func:`reporting_errors`).
        ProcessError: a process died otherwise; the message has its last lines of output.
    """
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryDirectory(prefix="olmo-bridge-") as folder, _Store(count) as store:
        error_file = Path(folder) / "error"
        common = {**_inherited(count), **(environment or {}), _ERROR_FILE: str(error_file)}
        environments = [common | store.environment(rank) for rank in range(count)]
        with (Path(folder) / "stderr").open("w+") as stderr:
            group = _Group(command, environments, stderr, stoppable)
            try:
                with _forwarding_signals(group) if stoppable else contextlib.nullcontext():
                    yield group.lines
            except BaseException:
                group.stop()
                raise
            finally:
                group.close()
            if group.failure:
                stderr.seek(0)
                raise _error(error_file, stderr.read(), group.failure)


def _inherited(count: int) -> dict[str, str]:
    """Return this process's environment without torchrun's variables."""
    of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in of_torchrun}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return env


class _Store:
    """Rendezvous store of several processes, held like torchrun's in the process that starts them.

    The system chooses its port and binds it at once, so no other program can take it.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> _Store:
        if self._count > 1:
            import torch.distributed as dist

            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._count > 1:
            del self._store

    def environment(self, rank: int) -> dict[str, str]:
        """Return the environment variables that connect a process to the store."""
        if self._count == 1:
            return {}
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }


class _Group:
    """Processes that run the same command, in a process group of their own.

    Ctrl-C in a terminal does not reach them, and a signal to the group also reaches their helpers:
    one of megatron-core's outlives the process that started it.
    """

    def __init__(
        self,
        command: list[str],
        environments: Sequence[Mapping[str, str]],
        stderr: IO[str],
        stoppable: bool,
    ) -> None:
        self.failure = 0
        """Exit code of the first process that failed."""
        self._stoppable = stoppable
        output, self._pipe = os.pipe()
        self.lines = _lines(output)
        """Their output, line by line."""
        child_end, self._lifeline = os.pipe()  # see _end_with_parent
        self._running: list[subprocess.Popen[str]] = []
        for env in environments:
            self._running.append(
                subprocess.Popen(
                    command,
                    stdin=child_end,
                    stdout=self._pipe,
                    stderr=stderr,
                    text=True,
                    env=env,
                    process_group=self._running[0].pid if self._running else 0,
                )
            )
        os.close(child_end)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """Wait for all processes; if one fails, end the others, which may be waiting for it."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        for process in self._running:
            wait = lambda process=process: ended.put(process.wait())  # noqa: E731
            threading.Thread(target=wait, daemon=True).start()
        overdue = threading.Timer(_GRACE, self._kill)
        overdue.daemon = True
        for _ in self._running:
            code = ended.get()
            if code and not self.failure:
                self.failure = code
                self.stop()
                overdue.start()
        overdue.cancel()
        self._kill()  # helpers that still run
        # End the output by a marker: a helper may still hold the pipe open.
        with contextlib.suppress(BrokenPipeError):  # the reader was interrupted by Ctrl-C
            os.write(self._pipe, _NO_MORE.encode())
        os.close(self._pipe)

    def terminate(self) -> None:
        """Send SIGTERM to each process."""
        for process in self._running:
            process.terminate()

    def stop(self) -> None:
        """Ask the processes to stop if they handle SIGTERM, otherwise kill them."""
        if self._stoppable:
            self.terminate()
        else:
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: all are zombies
            os.killpg(self._running[0].pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait until all processes have ended."""
        for _ in self.lines:  # read on, as a full pipe would block them
            pass
        self._watcher.join()
        os.close(self._lifeline)


def _lines(pipe: int) -> Iterator[str]:
    with os.fdopen(pipe) as output:
        for line in output:
            text, no_more, _ = line.partition(_NO_MORE)
            if text:
                yield text
            if no_more:
                return


@contextlib.contextmanager
def _forwarding_signals(group: _Group) -> Iterator[None]:
    """Forward signals to stop to the group, as SIGTERM, instead of ending this process."""

    def forward(number: int, frame: FrameType | None) -> None:
        group.terminate()

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _error(error_file: Path, stderr: str, code: int) -> BridgeError:
    """Return the error of the process that failed first."""
    if error_file.exists():
        kind, _, message = error_file.read_text().partition(":")
        return getattr(errors, kind, BridgeError)(message)
    end = f"ended with exit code {code}"
    if code < 0:
        end = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            end += ", as the system does when memory runs out"
    last = "\n".join(stderr.strip().splitlines()[-_LAST_LINES:])
    return ProcessError(f"a process {end}" + (f"; its last lines:\n{last}" if last else ""))


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """In a process started here, pass errors of this package to the parent, and end with it.

    In any other process the error is raised.
    """
    path = os.environ.pop(_ERROR_FILE, None)  # so that processes started here don't inherit it
    if path is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    except BridgeError as error:
        if path is None:
            raise
        partial = Path(f"{path}.{os.getpid()}")  # another process may write its error right now
        partial.write_text(f"{type(error).__name__}:{error}")
        partial.replace(path)
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """Wait for the end of standard input, a pipe from the parent process that closes when the
    parent is gone, however it ended."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
