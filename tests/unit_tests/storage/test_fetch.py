"""Fetching runs: which ranges are asked for, and where their bytes go."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_olmo_bridge.storage.fetch import Run, fetch


@dataclass(eq=False)
class File:
    """Bytes that arrive in chunks of some size."""

    name: str
    data: bytes
    chunk: int
    asked: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    def stream(
        self, offset: int, length: int, buffer: memoryview, pause: Callable[[float], Any]
    ) -> Iterator[memoryview]:
        self.asked.append((offset, length))
        for at in range(offset, offset + length, self.chunk):
            part = self.data[at : min(at + self.chunk, offset + length)]
            buffer[: len(part)] = part
            yield buffer[: len(part)]


def fetched(runs: list[Run], size: int) -> bytes:
    out = bytearray(size)

    def write(data: memoryview, offset: int) -> None:
        out[offset : offset + len(data)] = data

    list(fetch(runs, write, memoryview(bytearray(100)), lambda _: None))
    return bytes(out)


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_is_asked_for_once_and_goes_to_its_place(seed: int) -> None:
    rng = random.Random(seed)
    files = [File(name, rng.randbytes(500), rng.randrange(1, 60)) for name in "ab"]
    cuts = sorted(rng.sample(range(1, 500), 12))
    pieces = [(f, a, b) for f in files for a, b in zip([0, *cuts], [*cuts, 500], strict=True)]
    pieces = [piece for piece in pieces if rng.random() < 0.8]
    rng.shuffle(pieces)
    runs, expected = [], b""
    for file, begin, end in pieces:
        runs.append(Run(file, begin, len(expected), end - begin))  # type: ignore[arg-type]
        expected += file.data[begin:end]
    assert fetched(runs, len(expected)) == expected
    assert sum(length for file in files for _, length in file.asked) == len(expected)


def test_runs_that_touch_are_one_range() -> None:
    file = File("a", bytes(range(200)), 7)
    runs = [Run(file, at, 190 - at, 10) for at in range(0, 100, 10)]  # type: ignore[arg-type]
    runs.append(Run(file, 110, 0, 10))  # type: ignore[arg-type]
    fetched(runs, 200)
    assert file.asked == [(0, 100), (110, 10)]
