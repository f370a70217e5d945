"""The fuzzer finds exactly the faults that are planted in a reader."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import isolated
import pytest
from isolated import Outcome
from targets import Target

from megatron_olmo_bridge.errors import FormatError

SOUND = b"sound text of some length"


def reads(folder: Path) -> Any:
    """Read without a fault: refuse any change."""
    data = (folder / "file").read_bytes()
    if data != SOUND:
        raise FormatError("damaged")
    return data.decode()


def changed(folder: Path) -> bool:
    return (folder / "file").read_bytes() != SOUND


def raises(folder: Path) -> Any:
    return {}["key"] if changed(folder) else reads(folder)


def understands(folder: Path) -> Any:
    return "another" if changed(folder) else reads(folder)


def takes_long(folder: Path) -> Any:
    while changed(folder) and time.process_time() < fuzz.MOST_SECONDS + 0.1:
        pass
    return reads(folder)


def takes_much(folder: Path) -> Any:
    held = bytearray(fuzz.MOST_BYTES + (50 << 20)) if changed(folder) else b""
    for at in range(0, len(held), 4096):
        held[at] = 1
    return reads(folder)


def takes_all(folder: Path) -> Any:
    if changed(folder):
        bytearray(2 * isolated.ADDRESS_SPACE)
    return reads(folder)


def swallows_memory_errors(folder: Path) -> Any:
    try:
        return takes_all(folder)
    except MemoryError as error:
        raise FormatError("damaged") from error


def writes(folder: Path) -> Any:
    if changed(folder):
        (folder / "another").touch()
    return reads(folder)


def dies(folder: Path) -> Any:
    if changed(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    return reads(folder)


def says_nothing(folder: Path) -> Any:
    if changed(folder):
        raise FormatError("")
    return reads(folder)


class Forking:
    """Run cases of the planted reader like the fuzzer's own workers, but as forks of this
    process."""

    planted: Callable[[Path], Any]

    def __init__(self, side: str) -> None:
        pass

    def run(self, target: str, folder: Path) -> Outcome:
        return isolated._forked(Forking.planted, folder)

    def close(self) -> None:
        pass


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    (tmp_path / "sound/folder").mkdir(parents=True)
    (tmp_path / "sound/folder/file").write_bytes(SOUND)
    return tmp_path / "sound"


@pytest.fixture
def findings(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[Path], Any]], list[Path]]]:
    """Return what the fuzzer finds in a reader with a few changes of a file."""
    monkeypatch.setattr(fuzz, "Worker", Forking)

    def find(reader: Callable[[Path], Any]) -> list[Path]:
        target = Target("text", "folder", Path("file"), "changed_bytes", reader)
        monkeypatch.setattr(Forking, "planted", staticmethod(reader), raising=False)
        fuzzer = fuzz.Fuzzer(sound, tmp_path / "findings", [target])
        fuzzer.run(target, number=1, cases=10)
        assert fuzzer.counts["text"]["cases"] > 0
        return sorted((tmp_path / "findings").glob("*"))

    yield find
    assert (sound / "folder/file").read_bytes() == SOUND


def test_correct_readers_have_no_findings(
    findings: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert findings(reads) == []
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process and /proc")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (raises, "traceback: .*KeyError: 'key'"),
        (understands, "value: understood otherwise than by the reference: 'another' and not"),
        (takes_long, r"time: \d\.\d s of processor time"),
        (takes_much, r"memory: 3\d\d MiB"),
        (takes_all, "traceback: .*MemoryError"),
        (swallows_memory_errors, "memory: damaged"),
        (writes, "written: the folder is not as it was"),
        (dies, "died: exit status -9"),
        (says_nothing, "message: 0 characters"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found_and_kept(
    findings: Callable[..., list[Path]],
    fault: Callable[[Path], Any],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    [kept] = findings(fault)
    assert kept.read_bytes() != SOUND
    shown = capsys.readouterr().out
    assert re.search(f"(?s)FINDING text: {says}", shown), shown
    assert f"--replay {kept}" in shown


def test_a_case_that_hangs_is_ended(
    findings: Callable[..., list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(isolated, "HANG", 0.2)

    def waits(folder: Path) -> Any:
        if changed(folder):
            signal.pause()
        return reads(folder)

    assert len(findings(waits)) == 1
    assert "FINDING text: hung: hung" in capsys.readouterr().out
