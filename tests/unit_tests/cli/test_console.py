"""What all commands share: errors, tables, numbers, the progress bar."""

import contextlib
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import typer

from megatron_olmo_bridge.cli.console import ProgressBar, guarded, human_bytes, table
from megatron_olmo_bridge.errors import FormatError


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2_970_000, "2.97 MB"),
     (14_600_000_000, "14.60 GB"), (5_000_000_000_000, "5000.00 GB")],
)  # fmt: skip
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def raises(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (FormatError("file x is damaged"), 2, "olmo-bridge: file x is damaged\n"),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), 2,
         "olmo-bridge: /a/b: No such file or directory\n"),
        (OSError(5, "Input/output error"), 2, "olmo-bridge: Input/output error\n"),
        (OSError("only words"), 2, "olmo-bridge: only words\n"),
        (KeyboardInterrupt(), 130, "olmo-bridge: interrupted."),
    ],
)  # fmt: skip
def test_errors_become_one_message_and_an_exit_code(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught:
        guarded(raises(error))()
    captured = capsys.readouterr()
    assert caught.value.exit_code == code
    assert captured.err.startswith(says)
    assert captured.out == ""


def test_a_fault_of_our_own_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(raises(ZeroDivisionError()))()


def test_a_table_shows_brackets_and_long_names_whole(capsys: pytest.CaptureFixture[str]) -> None:
    name = "decoder.layers.*." + "x" * 120
    table(["name", "block"], [[name, "[0:5, 1:2]"], ["[bold]b", "[/]"]], title="a title")
    out = capsys.readouterr().out
    assert name in out
    for text in ("a title", "name", "block", "[0:5, 1:2]", "[bold]b", "[/]"):
        assert text in out


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    """``olmo-bridge models | head -1``: exit code 1 would say that a difference was found."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megatron_olmo_bridge", "models"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """Standard error is a terminal; yields what is shown on it, complete at the end."""
    master, slave = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while data := os.read(master, 4096):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(slave, "w") as stream:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        yield shown
    reader.join()
    os.close(master)


def progress(quiet: bool) -> None:
    with ProgressBar(quiet) as bar:
        bar.begin("importing", 4_000_000)
        bar.advance(1_500_000)
        bar.advance(2_500_000)
        bar.end()


def test_a_terminal_shows_bytes_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        progress(quiet=False)
    for text in (b"importing", b"4.0/4.0 MB", b"/s"):
        assert text in shown


def test_a_quiet_terminal_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        progress(quiet=True)
    assert shown == b""


def test_no_terminal_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress(quiet=False)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_the_bar_is_taken_down_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        terminal(monkeypatch) as shown,
        pytest.raises(FormatError),
        ProgressBar(quiet=False) as bar,
    ):
        bar.begin("importing", 10)
        raise FormatError("damaged")
    assert b"\x1b[?25h" in shown  # the cursor is there again
