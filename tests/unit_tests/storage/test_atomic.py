"""A file or folder is complete or absent, wherever writing it is stopped."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.storage import atomic
from megatron_olmo_bridge.storage.atomic import replace_file, replacing_folder

CALLS = ("open", "fsync", "rename", "fsync of the folder")
KILLED = """
import os, pathlib, signal, sys
from megatron_olmo_bridge.storage import atomic

file, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def stop(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def counted(function):
    def call(*args, **kwargs):
        global calls
        if calls == last:
            stop()
        calls += 1
        return function(*args, **kwargs)
    return call
pathlib.Path.open = counted(pathlib.Path.open)
pathlib.Path.replace = counted(pathlib.Path.replace)
os.fsync = counted(os.fsync)
atomic.replace_file(file, "newer")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data", ["é\n", "é\n".encode()])
def test_a_new_file(tmp_path: Path, data: str | bytes) -> None:
    replace_file(tmp_path / "run.yaml", data)
    assert (tmp_path / "run.yaml").read_bytes() == "é\n".encode()
    assert names(tmp_path) == ["run.yaml"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    replace_file(tmp_path / "run.yaml", "text")
    assert (tmp_path / "run.yaml").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("call", range(len(CALLS)), ids=CALLS)
def test_killed_before_a_call(tmp_path: Path, call: int) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("older")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file), str(call)], check=False)
    assert killed.returncode == -signal.SIGKILL
    renamed = call > CALLS.index("rename")
    assert file.read_text() == ("newer" if renamed else "older")
    assert set(names(tmp_path)) - {"run.yaml.partial"} == {"run.yaml"}

    replace_file(file, "newest")

    assert file.read_text() == "newest"
    assert names(tmp_path) == ["run.yaml"]


def test_what_cannot_be_written_leaves_the_file_of_before(tmp_path: Path) -> None:
    """The error names the file, as one of fsync doesn't."""
    (tmp_path / "run.yaml").write_text("older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            replace_file(tmp_path / "run.yaml", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert raised.value.filename == str(tmp_path / "run.yaml.partial")
    assert (tmp_path / "run.yaml").read_text() == "older"
    assert names(tmp_path) == ["run.yaml"]


def test_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the bytes, then the name, then the folder that has it."""
    synced = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path, (tmp_path / "run.yaml").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    replace_file(tmp_path / "run.yaml", "text")
    assert synced == [(tmp_path / "run.yaml.partial", False), (tmp_path, True)]


# --------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "renamed"])
@pytest.mark.parametrize("older", [True, False], ids=["another", "none"])
def test_a_folder_takes_the_place_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, exchanges: bool
) -> None:
    """The file that only the older one has is gone; so is what a kill left."""
    folder = tmp_path / "tokenizer"
    for left in [tmp_path / "tokenizer.partial"] + [folder] * older:
        left.mkdir()
        (left / "older.json").touch()
    if not exchanges:
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    with replacing_folder(folder) as partial:
        assert names(partial) == []
        (partial / "newer.json").touch()
        assert folder.exists() == older
    assert names(folder) == ["newer.json"]
    assert names(tmp_path) == ["tokenizer"]


def test_an_old_folder_is_restored_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.old.partial").mkdir()
    (tmp_path / "tokenizer.old.partial/older.json").touch()
    with pytest.raises(OSError, match="full"), replacing_folder(tmp_path / "tokenizer"):
        raise OSError("full")
    assert names(tmp_path / "tokenizer") == ["older.json"]


def test_an_error_leaves_the_folder_of_before(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "older.json").touch()
    with pytest.raises(OSError, match="full"), replacing_folder(folder) as partial:
        (partial / "newer.json").touch()
        raise OSError("full")
    assert names(folder) == ["older.json"]
    assert names(tmp_path) == ["tokenizer"]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "renamed"])
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path: Path, exchanges: bool) -> None:
    """Killed before each call that changes names. Where names can't be exchanged, there may be
    neither folder, but never half of one."""
    folder, call, found = tmp_path / "tokenizer", 0, []
    while not found or found[-1] != "finished":
        folder.mkdir(exist_ok=True)
        write(folder, "older")
        process = os.fork()
        if not process:
            kill_at(call, exchanges)
            with replacing_folder(folder) as partial:
                write(partial, "newer")
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        states = {"": None, "older": ["older-1", "older-2"], "newer": ["newer-1", "newer-2"]}
        content = names(folder) if folder.exists() else None
        found.append(next(state for state, files in states.items() if files == content))
        shutil.rmtree(folder, ignore_errors=True)
        call += 1
        if not killed:
            assert names(tmp_path) == []
            found.append("finished")
    assert found[0] == "older" and found[-2] == "newer"
    assert ("" in found) == (not exchanges)


def write(folder: Path, version: str) -> None:
    for name in names(folder):
        (folder / name).unlink()
    for number in (1, 2):
        (folder / f"{version}-{number}").touch()


def kill_at(call: int, exchanges: bool) -> None:
    """Kill this process before the given call (counted from 0) that changes a name on the disk."""
    calls = itertools.count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return run

    exchange = atomic.exchange if exchanges else lambda *_: False
    atomic.exchange = counted(exchange)
    for name in ("mkdir", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
