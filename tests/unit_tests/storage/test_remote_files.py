"""Pinned files: attempts, waits, pages, and what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import RemotePath, Status
from megatron_olmo_bridge.storage import remote_files
from megatron_olmo_bridge.storage.remote_files import PAGE, TRIES, PinnedFiles, TryAgainError

DATA = bytes(range(256)) * 400


class Memory:
    """Transport whose files are in memory; each of ``failures`` ends one request."""

    address = url = "mem://files"
    is_immutable = False

    def __init__(self, **contents: bytes) -> None:
        self.contents = contents
        self.failures: list[Exception | int] = []
        """Errors, or the number of bytes after which the connection breaks."""
        self.requests: list[tuple[int, int]] = []

    def listing(self) -> dict[str, Status]:
        return {key: Status(len(data), "tag") for key, data in self.contents.items()}

    def probe(self, key: str) -> tuple[Status, bytes] | None:
        return self.listing()[key], b""

    @contextlib.contextmanager
    def open(self, key: str, status: Status, begin: int, end: int) -> Iterator[Any]:
        self.requests.append((begin, end))
        failure = self.failures.pop(0) if self.failures else end - begin
        if isinstance(failure, Exception):
            raise failure
        yield Body(self.contents[key][begin : begin + failure])


class Body:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def readinto(self, out: memoryview) -> int:
        count = min(len(out), len(self.data))
        out[:count], self.data = self.data[:count], self.data[count:]
        return count


def received(transport: Memory, pauses: list[float], offset: int = 0) -> bytes:
    files = PinnedFiles(transport, 1)  # type: ignore[arg-type]
    buffer = memoryview(bytearray(1000))
    length = len(transport.contents["a"]) - offset
    return b"".join(map(bytes, files.stream("a", offset, length, buffer, pauses.append)))


def test_what_arrived_is_not_asked_for_again() -> None:
    transport, pauses = Memory(a=DATA), []
    transport.failures = [70_000, 5, TryAgainError("busy", 3.0)]
    assert received(transport, pauses, 10) == DATA[10:]
    ends = [70_010, 70_015, 70_015]
    assert transport.requests == [(10, len(DATA)), *((end, len(DATA)) for end in ends)]
    assert [0.25 <= pauses[0] <= 0.5, 0.5 <= pauses[1] <= 1] == [True, True]
    assert pauses[2] == 3.0  # as the server said


def test_a_server_that_makes_no_progress_is_given_up() -> None:
    transport, pauses = Memory(a=DATA), []
    transport.failures = [10] * TRIES
    with pytest.raises(InputError, match=f"given up after {TRIES} attempts without progress"):
        received(transport, pauses)
    assert len(pauses) == TRIES - 1


def test_a_server_that_breaks_off_after_progress_is_not_given_up() -> None:
    transport = Memory(a=DATA * 10)
    transport.failures = [remote_files.PROGRESS] * (TRIES + 1)
    assert received(transport, []) == DATA * 10


def test_a_server_that_asks_to_wait_too_long_is_not_waited_for() -> None:
    transport, pauses = Memory(a=DATA), []
    transport.failures = [TryAgainError("the server answers 429", 3600.0)]
    with pytest.raises(InputError, match=r"a: the server asks to wait 3600 s \(the server answers"):
        received(transport, pauses)
    assert pauses == []


def test_headers_are_read_by_pages_which_are_kept() -> None:
    transport = Memory(a=DATA)
    files = PinnedFiles(transport, 1)  # type: ignore[arg-type]
    assert files.read("a", 5, 10) == DATA[5:15]
    assert files.read("a", PAGE - 2, 4) == DATA[PAGE - 2 : PAGE + 2]
    assert files.read("a", 100, PAGE) == DATA[100 : 100 + PAGE]
    assert transport.requests == [(0, PAGE), (PAGE, 2 * PAGE)]
    assert files.read("a", len(DATA) - 3, 3) == DATA[-3:]


def test_pages_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "KEPT_PAGES", 2)
    transport = Memory(a=DATA)
    files = PinnedFiles(transport, 1)  # type: ignore[arg-type]
    for page in (0, 1, 2, 0):
        files.read("a", page * PAGE, 1)
    assert [begin // PAGE for begin, _ in transport.requests] == [0, 1, 2, 0]


def test_a_changed_file_is_found_at_the_end() -> None:
    transport = Memory(a=DATA, b=DATA)
    files = PinnedFiles(transport, 1)  # type: ignore[arg-type]
    files.read("a", 0, 1)
    transport.contents["b"] = b"nobody has read it"
    files.check_unchanged()
    transport.contents["a"] = DATA[1:]
    with pytest.raises(InputError, match="mem://files/a: changed while the checkpoint was read"):
        files.check_unchanged()


def test_a_folder_lists_what_is_directly_in_it() -> None:
    files = PinnedFiles(Memory(**{"a": b"", "b/c": b"", "b/d.txt": b""}), 1)  # type: ignore[arg-type]
    root = RemotePath(files)
    assert sorted(map(str, root.iterdir())) == ["mem://files/a", "mem://files/b"]
    assert [p.name for p in root.glob("b/*.txt")] == ["d.txt"]
    assert sorted(p.name for p in root.rglob("*")) == ["a", "c", "d.txt"]
    assert (root / "b").is_dir() and not (root / "b").is_file() and (root / "b/c").is_file()
    assert not (root / "absent").exists()
    assert (root / "b/c").parent == root / "b"
