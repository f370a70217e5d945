"""When the disk fails, an error names the cause, no output appears, and --resume completes it.

The C library returns the errors in place of the kernel (see faults.c).
"""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from faults import library, run
from slow import slow_but
from trees import tree_hash

from megatron_olmo_bridge import import_checkpoint, synth
from megatron_olmo_bridge.checkpoints.open import KINDS, find_kind
from megatron_olmo_bridge.errors import BridgeError

IO_ERROR = {"errno": errno.EIO}
SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the library and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("faults")
    library(folder)
    synth("olmo2-tiny", folder / "hf", max_shard_size="500KB")
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder


FAILURES = [
    (("import", "hf"), "read", "faults0/hf"),
    (("import", "hf"), "copy", f"hf/{SHARD}"),
    (("import", "hf", "--dtype", "float32"), "pread", f"hf/{SHARD}"),
    (("import", "hf"), "copy", "iter_0000000/__0_0.distcp"),
    (("import", "hf"), "pwrite", "iter_0000000/__0_0.distcp"),
    (("import", "hf"), "allocate", "iter_0000000/__0_0.distcp"),
    (("import", "hf"), "fsync", "iter_0000000/__0_0.distcp"),
    (("import", "hf"), "fsync", "iter_0000000/common.pt"),
    (("import", "hf"), "write", "iter_0000000/hf/config.json"),
    (("import", "hf"), "fsync", "dst/latest_checkpointed_iteration.txt"),
    (("import", "hf"), "rename", "dst"),
    (("export", "megatron"), "read", "faults0/megatron"),
    (("export", "megatron"), "copy", "iter_0000000/__0_0.distcp"),
    (
        ("export", "megatron", "--max-shard-size", "500KB"),
        "fsync",
        "dst.partial/model-00002-of-00006.safetensors",
    ),
    (("average", "hf", "hf"), "pread", f"hf/{SHARD}"),
]
QUICK = [case for case in FAILURES if case[1] in ("read", "copy", "rename")]


@pytest.mark.parametrize(("arguments", "call", "file"), slow_but(QUICK, FAILURES))
def test_every_input_and_output_error_names_the_file(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], call: str, file: str
) -> None:
    operation, *rest = arguments
    sources = [folder / word for word in rest if word in ("hf", "megatron")]
    options = rest[len(sources) :]
    dst = tmp_path / "dst"
    command = [operation, *sources, dst, *options]

    done = run(folder / "faults.so", command, within=file, call=call, **IO_ERROR)

    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "Input/output error" in line
    # The kernel doesn't tell which side of a copy failed, so the message names source and output.
    assert (file.rpartition("/")[2] in line) or (
        call == "copy" and "what is copied from it" in line
    )
    for path in (dst, tmp_path / "dst.partial"):
        with pytest.raises(BridgeError):  # not a checkpoint
            find_kind(path)
    again = run(folder / "faults.so", [*command, "--resume"], within="nothing")
    assert again.returncode == 0, again.stderr
    whole = tmp_path / "whole"
    run(folder / "faults.so", [operation, *sources, whole, *options], within="nothing")
    assert tree_hash(dst) == tree_hash(whole)
    assert find_kind(dst)[0] in KINDS


def test_verify_reports_an_error_while_reading(folder: Path) -> None:
    done = run(
        folder / "faults.so", ["verify", folder / "hf", folder / "megatron"],
        within=f"hf/{SHARD}", call="pread", **IO_ERROR,
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stderr == f"olmo-bridge: {folder / 'hf' / SHARD}: Input/output error\n"


def test_a_full_disk_is_reported_as_such(folder: Path, tmp_path: Path) -> None:
    done = run(
        folder / "faults.so", ["import", folder / "hf", tmp_path / "dst"],
        within="__0_0.distcp", call="copy", errno=errno.ENOSPC,
    )  # fmt: skip

    assert done.returncode == 2
    partial = tmp_path / "dst.partial"
    assert done.stderr == f"olmo-bridge: {partial}: the disk is full. Nothing was kept.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [4, 100_000])
def test_a_limit_on_the_size_of_files_is_reported(folder: Path, tmp_path: Path, limit: int) -> None:
    """The limit of ``ulimit -f`` is checked before a byte is written."""
    arguments: tuple[tuple[str, ...], ...] = (
        ("import", "hf"), ("export", "megatron"), ("average", "hf", "hf")
    )  # fmt: skip
    for operation, *sources in arguments:
        command = [operation, *(folder / source for source in sources), tmp_path / "dst"]
        done = subprocess.run(
            [sys.executable, "-B", "-m", "megatron_olmo_bridge", *map(str, command)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
        )

        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"may write files of {limit:,} at most. Raise the limit (ulimit -f)." in line
        assert list(tmp_path.iterdir()) == []
