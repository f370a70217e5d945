"""A checkpoint takes its name, also from another one: at every moment one of the two has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_olmo_bridge.storage.atomic import exchange
from megatron_olmo_bridge.training import naming
from megatron_olmo_bridge.training.naming import clean, put_back, take_name

NAME = "iter_0000005"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / f"{NAME}.partial", "newer")


def checkpoint(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "common.pt").write_text(text)
    return folder


def found(root: Path) -> dict[str, str]:
    return {path.name: (path / "common.pt").read_text() for path in sorted(root.iterdir())}


def test_a_new_one_takes_its_name(partial: Path, tmp_path: Path) -> None:
    take_name(partial, tmp_path / NAME)
    assert found(tmp_path) == {NAME: "newer"}


def test_the_name_is_never_without_one(partial: Path, tmp_path: Path) -> None:
    """The two are exchanged in one step, and the older one deleted later."""
    checkpoint(tmp_path / NAME, "older")
    if not exchange(partial, tmp_path / NAME):
        pytest.skip("this file system can't exchange two names")
    assert exchange(partial, tmp_path / NAME)
    assert found(tmp_path) == {NAME: "older", partial.name: "newer"}

    take_name(partial, tmp_path / NAME)

    assert found(tmp_path) == {NAME: "newer", partial.name: "older"}
    clean(tmp_path)
    assert found(tmp_path) == {NAME: "newer"}


def test_names_that_cannot_be_exchanged_are_left(tmp_path: Path) -> None:
    checkpoint(tmp_path / NAME, "older")
    assert not exchange(tmp_path / "absent", tmp_path / NAME)
    assert found(tmp_path) == {NAME: "older"}


@pytest.mark.parametrize("interrupted", [False, True])
def test_where_two_names_cannot_be_exchanged(
    partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """It takes two renames; after a kill between them, the next start restores the older one."""
    monkeypatch.setattr(naming, "exchange", lambda *_: False)
    checkpoint(tmp_path / NAME, "older")
    if interrupted:
        partial.rename(tmp_path / "elsewhere")  # so that the second rename fails
        with pytest.raises(FileNotFoundError):
            take_name(partial, tmp_path / NAME)
        assert list(found(tmp_path)) == ["elsewhere", f"{NAME}.replaced.partial"]
        put_back(tmp_path)
        assert found(tmp_path) == {"elsewhere": "newer", NAME: "older"}
        return
    take_name(partial, tmp_path / NAME)
    assert found(tmp_path) == {NAME: "newer", f"{NAME}.replaced.partial": "older"}
    put_back(tmp_path)
    clean(tmp_path)
    assert found(tmp_path) == {NAME: "newer"}


def test_a_checkpoint_that_was_being_replaced_gets_its_name_back(tmp_path: Path) -> None:
    """Unless the one that replaces it is there."""
    for name in ("iter_0000004.replaced.partial", "iter_0000008.replaced.partial", "iter_0000008"):
        (tmp_path / name).mkdir()
    put_back(tmp_path)
    left = ["iter_0000004", "iter_0000008", "iter_0000008.replaced.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
