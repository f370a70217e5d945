"""The iterations of a Megatron checkpoint: which is taken, and what is said where none can be."""

from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.iterations import TRACKER, iteration_folder, iteration_folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("iter_0000020", "iter_0000003", "release", "logs", "iter_x"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("iteration", "tracker", "name"),
    [
        (None, "20\n", "iter_0000020"),
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


def test_all_iterations_in_order(root: Path) -> None:
    found = [folder.name for folder in iteration_folders(root)]
    assert found == ["iter_0000003", "iter_0000020", "release"]


THERE = (
    "Iterations there: iter_0000003, iter_0000020, release. Name one of these folders, or pass "
    "--iteration."
)


@pytest.mark.parametrize(
    ("iteration", "says"),
    [
        (None, f"no {TRACKER}: the save was interrupted, or this is no checkpoint root. {THERE}"),
        (4, f"has no iter_0000004. {THERE}"),
        ("last", f"'last' is no iteration: a number or 'release'. {THERE}"),
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
        (b"20\n21", "'20\\n21' is no iteration: a number or 'release'."),
        (b"20.0", "'20.0' is no iteration: a number or 'release'."),
        (b"iter_0000020", "'iter_0000020' is no iteration: a number or 'release'."),
        (bytes(1 << 20), "'\\x00\\x00\\x00\\x00"),
    ],
)
def test_a_tracker_that_names_no_iteration(root: Path, content: bytes, says: str) -> None:
    (root / TRACKER).write_bytes(content)
    with pytest.raises(InputError) as caught:
        iteration_folder(root, None)
    assert str(caught.value).startswith(f"{root / TRACKER}: {says}")
    assert str(caught.value).endswith(THERE)
    assert len(str(caught.value)) < 500


def test_a_tracker_where_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("3")
    with pytest.raises(
        InputError, match=r"names iter_0000003, which is not there\. Iterations there: none\."
    ):
        iteration_folder(tmp_path, None)
