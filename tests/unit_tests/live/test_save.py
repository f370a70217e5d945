"""A save of a live model respects another run that is writing in the same place.

Whole saves are in ``functional_tests/test_live_roundtrip.py``.
"""

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_olmo_bridge.errors import OutputError
from megatron_olmo_bridge.live.save import _begin
from megatron_olmo_bridge.storage.lock import take
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER


def test_a_folder_that_another_run_is_writing_is_left_alone(tmp_path: Path) -> None:
    root, stage = tmp_path / "out", tmp_path / "out.partial"
    stage.mkdir()
    (stage / "weights").touch()
    held = take(stage / PARTIAL_MARKER, is_journal=True)
    with pytest.raises(OutputError, match="another olmo-bridge is writing here right now"):
        _begin(root, stage, stage / "iter_0000000")
    assert (stage / "weights").exists()
    held.release()


def test_what_an_interrupted_save_left_is_replaced(tmp_path: Path) -> None:
    root, stage = tmp_path / "out", tmp_path / "out.partial"
    stage.mkdir()
    (stage / PARTIAL_MARKER).touch()
    (stage / "weights").touch()
    lock = _begin(root, stage, stage / "iter_0000000")
    assert {path.name for path in stage.iterdir()} == {PARTIAL_MARKER, "iter_0000000"}
    with pytest.raises(OutputError, match="another olmo-bridge is writing here right now"):
        take(stage / PARTIAL_MARKER)
    lock.release()
