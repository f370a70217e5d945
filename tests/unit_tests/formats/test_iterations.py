"""The iterations of a Megatron checkpoint: which is taken, and what is said where none can be."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.errors import BridgeError, InputError
from megatron_olmo_bridge.formats.iterations import (
    TRACKER,
    iteration_folder,
    iteration_folders,
    iteration_number,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("iter_0000020", "iter_0000003", "release", "logs", "iter_x"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("iteration", "tracker", "name"),
    [
        (None, "20\n", "iter_0000020"),
        (None, " 3", "iter_0000003"),  # Megatron strips it too
        (None, "003", "iter_0000003"),
        (None, "release", "release"),
        (3, "20", "iter_0000003"),
        ("3", "20", "iter_0000003"),
        ("0000003", None, "iter_0000003"),
        ("release", None, "release"),
    ],
)
def test_an_iterations_folder(
    root: Path, iteration: int | str | None, tracker: str | None, name: str
) -> None:
    if tracker is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert iteration_folder(root, iteration) == root / name


def test_all_iterations_in_the_order_of_their_numbers(root: Path) -> None:
    (root / "iter_10000000").mkdir()
    (root / "iter_9999999").mkdir()
    (root / "iter_٣").mkdir()  # a digit, but not one that Megatron writes
    (root / "iter_0000007").touch()
    found = [(folder.name, iteration_number(folder)) for folder in iteration_folders(root)]
    assert found == [
        ("iter_0000003", 3),
        ("iter_0000020", 20),
        ("iter_9999999", 9_999_999),
        ("iter_10000000", 10_000_000),
        ("release", None),
    ]


THERE = (
    "Iterations there: iter_0000003, iter_0000020, release. Name one of these folders, or pass "
    "--iteration."
)


@pytest.mark.parametrize(
    ("iteration", "says"),
    [
        (
            None,
            f"no {TRACKER}: the save was interrupted, or this is not a checkpoint root. {THERE}",
        ),
        (4, f"has no iter_0000004. {THERE}"),
        ("last", f"'last' is not an iteration: a number or 'release'. {THERE}"),
    ],
)
def test_no_such_iteration(root: Path, iteration: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        iteration_folder(root, iteration)
    assert str(caught.value) == f"{root}: {says}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty: the save was interrupted."),
        (b" \n\n", "is empty: the save was interrupted."),
        (b"5\n", "names iter_0000005, which is not there."),
        (b"20\n21", "'20\\n21' is not an iteration: a number or 'release'."),
        (b"20.0", "'20.0' is not an iteration: a number or 'release'."),
        (b"iter_0000020", "'iter_0000020' is not an iteration: a number or 'release'."),
        ("²".encode(), "'²' is not an iteration: a number or 'release'."),
        ("٣".encode(), "'٣' is not an iteration: a number or 'release'."),
        (b"\xb2", "'\N{REPLACEMENT CHARACTER}' is not an iteration: a number or 'release'."),
        (b"1_0", "'1_0' is not an iteration: a number or 'release'."),
        (b"+5", "'+5' is not an iteration: a number or 'release'."),
        (b"-1", "'-1' is not an iteration: a number or 'release'."),
        (b"9" * 500, f"'{'9' * 80}'... is not an iteration: a number or 'release'."),
    ],
)
def test_a_tracker_that_names_no_iteration(root: Path, content: bytes, says: str) -> None:
    (root / TRACKER).write_bytes(content)
    with pytest.raises(InputError) as caught:
        iteration_folder(root, None)
    assert str(caught.value).startswith(f"{root / TRACKER}: {says}")
    assert str(caught.value).endswith(THERE)
    assert len(str(caught.value)) < 500


def a_folder(tracker: Path) -> None:
    tracker.mkdir()


def a_pipe(tracker: Path) -> None:
    os.mkfifo(tracker)


def five_gigabytes(tracker: Path) -> None:
    with tracker.open("wb") as file:
        file.truncate(5 << 30)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (a_folder, "is a folder, not a regular file"),
        (a_pipe, "is a named pipe, not a regular file"),
        (five_gigabytes, "has 5,368,709,120 bytes; a file of this kind is read up to 1,024"),
    ],
)
def test_a_tracker_that_is_not_a_small_file(
    root: Path, make: Callable[[Path], None], says: str
) -> None:
    make(root / TRACKER)
    with pytest.raises(BridgeError) as caught:
        iteration_folder(root, None)
    assert str(caught.value) == f"{root / TRACKER}: {says}"


def test_a_message_names_the_last_of_many_iterations(tmp_path: Path) -> None:
    for number in range(1, 31):
        (tmp_path / f"iter_{number:07d}").mkdir()
    with pytest.raises(InputError) as caught:
        iteration_folder(tmp_path, 31)
    last = ", ".join(f"iter_{number:07d}" for number in range(11, 31))
    assert f"Iterations there: ..., {last}. Name one" in str(caught.value)


def test_a_tracker_where_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("3")
    with pytest.raises(
        InputError, match=r"names iter_0000003, which is not there\. Iterations there: none\."
    ):
        iteration_folder(tmp_path, None)
