"""What commands print: tables, numbers, the progress bar."""

import contextlib
import os
import pty
import sys
import threading
from collections.abc import Iterator

import pytest

from megatron_olmo_bridge.cli.console import ProgressBar, human_bytes, output, say, table
from megatron_olmo_bridge.errors import FormatError


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (2_970_000, "2.97 MB"),
        (14_600_000_000, "14.60 GB"),
        (5_000_000_000_000, "5000.00 GB"),
    ],
)
def test_sizes_have_binary_units(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_tables_show_brackets_and_long_names_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    name = "decoder.layers.*." + "x" * 120
    table(["name", "block"], [[name, "[0:5, 1:2]"], ["[bold]b", "[/]"]], title="a title")
    out = capsys.readouterr().out
    assert name in out
    for text in ("a title", "name", "block", "[0:5, 1:2]", "[bold]b", "[/]"):
        assert text in out


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say("Note: a\x1b[2J\n\tb")
    table(["name"], [["w\x1b]0;x\x07"]])
    assert capsys.readouterr().out.split() == ["Note:", r"a\x1b[2J", "b", "name", r"w\x1b]0;x\x07"]


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


def progress() -> None:
    with ProgressBar() as bar:
        bar.begin("importing", 4_000_000)
        bar.advance(1_500_000)
        bar.advance(2_500_000)
        bar.end()


def test_a_terminal_shows_bytes_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        progress()
    for text in (b"importing", b"4.0/4.0 MB", b"/s"):
        assert text in shown


def test_a_quiet_terminal_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "quiet", True)
    with terminal(monkeypatch) as shown:
        progress()
    assert shown == b""


def test_without_a_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    progress()
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_the_progress_bar_is_removed_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        terminal(monkeypatch) as shown,
        pytest.raises(FormatError),
        ProgressBar() as bar,
    ):
        bar.begin("importing", 10)
        raise FormatError("damaged")
    assert b"\x1b[?25h" in shown  # the cursor is there again
