"""What is cloned, by the plan and the file systems. The cloning itself is in the functional
tests, on file systems that can."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.formats.tensors import StoredArray, TensorView
from megatron_olmo_bridge.storage import cloning
from megatron_olmo_bridge.storage.cloning import Clones
from megatron_olmo_bridge.storage.plan import CopyPlan, Literal, OutputFile, Payload
from megatron_olmo_bridge.storage.runs import BLOCK


def plan(source: Path) -> CopyPlan:
    """Copies 32 blocks that begin at byte 72, and a tensor that is too short to be cloned."""
    source.write_bytes(bytes(40 * BLOCK))
    large = StoredArray(source, 72, (32, 2048), "bfloat16")
    small = StoredArray(source, 72 + 32 * BLOCK, (2048,), "bfloat16")
    parts = (
        Literal(0, bytes(72)),
        Payload(72, TensorView.of_array("large", large), "bfloat16"),
        Payload(72 + 32 * BLOCK, TensorView.of_array("small", small), "bfloat16"),
    )
    file = OutputFile("f", 72 + 33 * BLOCK, parts)
    return CopyPlan("import", source.parent, (file,), {}, ".")


def test_whole_blocks_of_large_tensors_are_cloned_and_the_rest_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "can_clone", lambda file, folder: True)
    planned = plan(tmp_path / "s")
    (file,) = planned.files
    clones = Clones.of(planned, tmp_path, "auto")
    assert list(clones.ranges(file)) == [(BLOCK, 31 * BLOCK)]
    assert list(clones.copied_ranges(file)) == [(0, BLOCK), (32 * BLOCK, BLOCK + 72)]
    assert clones.nbytes(planned.files) == 31 * BLOCK


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_nothing_is_cloned_where_it_can_or_may_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(cloning, "can_clone", lambda file, folder: mode == "never")
    planned = plan(tmp_path / "s")
    (file,) = planned.files
    clones = Clones.of(planned, tmp_path, mode)
    assert list(clones.copied_ranges(file)) == [(0, file.size)]


def test_always_is_refused_where_nothing_can_be_cloned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloning, "can_clone", lambda file, folder: False)
    with pytest.raises(OutputError, match=r"shares no blocks with .*s, which --reflink always"):
        Clones.of(plan(tmp_path / "s"), tmp_path, "always")


def test_another_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--reflink some: choose auto, always, never"):
        Clones.of(plan(tmp_path / "s"), tmp_path, "some")


def test_an_absent_file_system_call_means_no(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()  # has no block to try with
    assert not cloning.can_clone(tmp_path / "empty", tmp_path)
