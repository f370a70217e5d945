"""Conversions on file systems that share blocks: XFS and Btrfs, in images mounted by loop."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import olmo_bridge
from transformers import Olmo2Config, Olmo2ForCausalLM
from trees import contents

from megatron_olmo_bridge import WriteOptions, export_checkpoint, import_checkpoint
from megatron_olmo_bridge.storage import transfer
from megatron_olmo_bridge.tools.verify import verify

MAKE = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}
IMAGE_BYTES = 1 << 30


@pytest.fixture(scope="module", params=MAKE)
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A file system that can clone, with a model on it."""
    make = MAKE[request.param]
    if os.geteuid() != 0 or shutil.which(make[0]) is None:
        pytest.skip(f"needs root and {make[0]}")
    folder = tmp_path_factory.mktemp(request.param)
    image, mounted = folder / "image", folder / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run([*make, str(image)], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{request.param} can't be mounted here: {done.stderr.strip()}")
    try:
        config = Olmo2Config(
            vocab_size=1024, hidden_size=2048, intermediate_size=4096, num_hidden_layers=1,
            num_attention_heads=16, max_position_embeddings=64,
        )  # fmt: skip
        Olmo2ForCausalLM(config).to(torch.bfloat16).save_pretrained(mounted / "hf")
        os.sync()
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)
        image.unlink()


def used(disk: Path) -> int:
    """Bytes in use, after what is written has reached the disk."""
    os.sync()
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_both_ways_are_cloned_and_equal_bit_for_bit(disk: Path) -> None:
    before = used(disk)
    done = olmo_bridge("import", disk / "hf", disk / "m", "--json")
    assert done.exit_code == 0, done.output
    assert olmo_bridge("export", disk / "m", disk / "back", "--reflink", "always").exit_code == 0
    taken, model = used(disk) - before, size(disk / "hf")
    assert taken < 2 * 0.02 * model, f"{taken} of 2 x {model}"
    for other in ("m", "back"):
        assert verify(disk / "hf", disk / other).equal
    for made in ("m", "back"):
        shutil.rmtree(disk / made)


def test_the_output_is_the_same_as_without(disk: Path, tmp_path: Path) -> None:
    """On another file system, and where cloning is declined."""
    import_checkpoint(disk / "hf", tmp_path / "m")
    import_checkpoint(disk / "hf", disk / "cloned")
    before = used(disk)
    import_checkpoint(disk / "hf", disk / "copied", write=WriteOptions(reflink="never"))
    assert used(disk) - before > 0.99 * size(disk / "hf")
    expected = contents(tmp_path / "m")
    assert contents(disk / "cloned") == contents(disk / "copied") == expected
    export_checkpoint(tmp_path / "m", tmp_path / "hf")
    export_checkpoint(disk / "cloned", disk / "hf-again")
    records = contents(disk / "hf-again"), contents(tmp_path / "hf")
    assert all(files.pop("olmo_bridge.json") for files in records)  # they name their sources
    assert records[0] == records[1]
    for made in ("cloned", "copied", "hf-again"):
        shutil.rmtree(disk / made)


def test_an_interrupted_conversion_is_resumed(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone, done = transfer.clone, []

    def interrupted(*arguments: int) -> None:
        done.append(arguments)
        if len(done) == 3:
            raise KeyboardInterrupt
        clone(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "clone", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(disk / "hf", disk / "m")
    import_checkpoint(disk / "hf", disk / "m", write=WriteOptions(resume=True))
    assert verify(disk / "hf", disk / "m").equal
    shutil.rmtree(disk / "m")


def test_cloning_across_file_systems_is_refused_if_it_is_demanded(
    disk: Path, tmp_path: Path
) -> None:
    done = olmo_bridge("import", disk / "hf", tmp_path / "m", "--reflink", "always")
    assert done.exit_code == 2
    assert "shares no blocks with" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_model_fits_that_would_not_fit_twice(disk: Path) -> None:
    """Nothing is allocated, or demanded of the disk, for what is cloned."""
    if disk.parent.name.startswith("btrfs"):
        pytest.skip("the free space of Btrfs is an estimate")
    model = size(disk / "hf")
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - model // 4)
    done = olmo_bridge("import", disk / "hf", disk / "m", "--reflink", "never")
    assert done.exit_code == 2 and "the disk is too small" in done.output
    import_checkpoint(disk / "hf", disk / "m")
    assert verify(disk / "hf", disk / "m").equal
    shutil.rmtree(disk / "m")
    filler.unlink()
