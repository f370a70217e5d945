"""Which step of a run's folder is the last one."""

from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.iterations import TRACKER
from megatron_olmo_bridge.training.checkpoint import last_step


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir()


def test_a_folder_without_checkpoints_has_no_step(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    assert last_step(tmp_path / "absent") is None


def test_the_tracker_names_the_step(tmp_path: Path) -> None:
    folders(tmp_path, "iter_0000005", "iter_0000010")
    (tmp_path / TRACKER).write_text("5")
    assert last_step(tmp_path) == 5


def test_without_a_tracker_it_is_the_highest_number(tmp_path: Path) -> None:
    folders(tmp_path, "iter_9999999", "iter_10000000", "release")
    assert last_step(tmp_path) == 10_000_000


@pytest.mark.parametrize("tracker", [None, "release"])
def test_a_converted_checkpoint_is_not_a_step(tmp_path: Path, tracker: str | None) -> None:
    folders(tmp_path, "release")
    if tracker:
        (tmp_path / TRACKER).write_text(tracker)
    with pytest.raises(InputError) as caught:
        last_step(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'release'}: is not a checkpoint of a run. Name another folder as "
        "checkpoint.save, and this one as init.checkpoint."
    )


@pytest.mark.parametrize("tracker", ["²", "٣", "1_0", "+5", "-1", "", "9" * 500, "banana"])
def test_a_tracker_that_names_no_step(tmp_path: Path, tracker: str) -> None:
    folders(tmp_path, "iter_0000005")
    (tmp_path / TRACKER).write_text(tracker)
    with pytest.raises(InputError, match="Write the number of one of them into it"):
        last_step(tmp_path)
