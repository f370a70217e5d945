"""What tells a file from itself before: any change that the file system notices."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.storage.identity import Identity, Snapshot, identity_digest


def with_its_times_restored(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def changed(file: Path) -> None:
        status = file.stat()
        change(file)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    return changed


def rewrite(file: Path) -> None:
    file.write_bytes(file.read_bytes()[::-1])


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[::-1])
    other.rename(file)


def link_elsewhere(file: Path) -> None:
    target = file.with_name("elsewhere")
    target.write_bytes(file.read_bytes()[::-1])
    file.unlink()
    file.symlink_to(target)


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten in place": rewrite,
    "rewritten, its times restored": with_its_times_restored(rewrite),
    "replaced by another": replace,
    "replaced, its times restored": with_its_times_restored(replace),
    "truncated": lambda file: os.truncate(file, 3),
    "a link to another": link_elsewhere,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("weights.safetensors", "config.json", "README.md"):
        (tmp_path / name).write_bytes(b"content")
    return tmp_path


def snapshot(folder: Path) -> Snapshot:
    return Snapshot.of({folder: ("*.safetensors", "config.json"), folder / "absent": ("*",)})


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_a_file_that_changed(folder: Path, name: str, change: Callable[[Path], object]) -> None:
    before = snapshot(folder)
    digest = identity_digest({folder / name: Identity.of(folder / name)})

    change(folder / name)

    with pytest.raises(InputError, match=rf"{name}: changed while the checkpoint was read"):
        before.check_unchanged()
    assert identity_digest({folder / name: Identity.of(folder / name)}) != digest


def test_a_file_that_vanished_or_appeared(folder: Path) -> None:
    before = snapshot(folder)
    (folder / "more.safetensors").touch()
    with pytest.raises(InputError, match=r"more.safetensors: appeared while"):
        before.check_unchanged()

    before = snapshot(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: vanished while"):
        before.check_unchanged()


def test_reading_and_other_files_are_no_change(folder: Path) -> None:
    before = snapshot(folder)

    (folder / "weights.safetensors").read_bytes()
    rewrite(folder / "README.md")
    (folder / "convert.log").touch()
    (folder / "nowhere.safetensors").symlink_to(folder / "lost")

    before.check_unchanged()
    with pytest.raises(InputError, match=r"README.md: changed"):
        before.check_unchanged(used={folder / "README.md"})


def test_the_digest_tells_paths_and_their_order(folder: Path) -> None:
    files = {f: Identity.of(f) for f in (folder / "config.json", folder / "README.md")}
    linked = folder.with_name(f"{folder.name}-linked")
    linked.symlink_to(folder)

    assert identity_digest(files) == identity_digest({linked / f.name: i for f, i in files.items()})
    assert identity_digest(files) != identity_digest(dict(reversed(files.items())))
    moved = {folder / f"other-{f.name}": identity for f, identity in files.items()}
    assert identity_digest(files) != identity_digest(moved)
