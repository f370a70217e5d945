"""A command killed before any system call that changes its files resumes to the same bytes.

The processes are real; the calls are counted, not timed (see faults.c)."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from faults import library, run
from killing import KILLED
from slow import slow_but
from small_tokenizer import make_tokenizer
from trees import tree_hash

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, synth
from megatron_olmo_bridge.convert.average import average_checkpoints
from megatron_olmo_bridge.convert.options import AverageOptions, ExportOptions
from megatron_olmo_bridge.data.options import PrepareOptions
from megatron_olmo_bridge.data.prepare import prepare_data
from megatron_olmo_bridge.storage.execute import WriteOptions

KILLS = int(os.environ.get("OLMO_BRIDGE_KILLS", "6"))
"""Number of kills of each command."""
SHARD_SIZE = "500KB"
RESUME = WriteOptions(resume=True)


class Command(NamedTuple):
    """Command that writes files, as a command line and as a function that resumes it."""

    line: tuple[object, ...]
    """All arguments except the output, which comes last."""
    resume: Callable[[Path], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the library, a checkpoint of each kind, a tokenizer, and tokens in several
    parts."""
    folder = tmp_path_factory.mktemp("kills")
    library(folder)
    synth("olmo2-tiny", folder / "hf", max_shard_size=SHARD_SIZE)
    synth("olmo2-tiny", folder / "other", seed=1)
    import_checkpoint(folder / "hf", folder / "megatron")
    make_tokenizer(folder / "tokenizer")
    rng = random.Random(0)
    tokens = (rng.randrange(300) for _ in range(3 << 19))
    (folder / "tokens.npy").write_bytes(b"".join(t.to_bytes(2, "little") for t in tokens))
    return folder


@pytest.fixture(params=slow_but(["import"], ["import", "export", "average", "prepare-data"]))
def command(request: pytest.FixtureRequest, folder: Path) -> Command:
    hf, other, megatron = (folder / name for name in ("hf", "other", "megatron"))
    tokenizer, tokens = folder / "tokenizer", folder / "tokens.npy"
    shards = ("--max-shard-size", SHARD_SIZE)
    export, average = (c(max_shard_size=SHARD_SIZE) for c in (ExportOptions, AverageOptions))
    prepare = PrepareOptions(tokenizer=tokenizer, workers=1, resume=True)
    commands: dict[str, Command] = {
        "import": Command(
            ("import", hf), lambda dst: import_checkpoint(hf, dst, write=RESUME)
        ),
        "export": Command(
            ("export", *shards, megatron),
            lambda dst: export_checkpoint(megatron, dst, export, RESUME),
        ),
        "average": Command(
            ("average", *shards, hf, other),
            lambda dst: average_checkpoints([hf, other], dst, average, RESUME),
        ),
        "prepare-data": Command(
            ("prepare-data", "--workers", 1, "--tokenizer", tokenizer, tokens),
            lambda dst: prepare_data([tokens], dst, prepare),
        ),
    }  # fmt: skip
    return commands[str(request.param)]


def test_resumed_to_the_same_bytes(folder: Path, tmp_path: Path, command: Command) -> None:
    library, counted = folder / "faults.so", tmp_path / "count"
    whole, dst = tmp_path / "whole" / "out", tmp_path / "again" / "out"
    for parent in (whole.parent, dst.parent):
        parent.mkdir()
    done = run(library, [*command.line, whole], within=whole.parent, count=counted)
    assert done.returncode == 0, done.stderr
    expected, calls = tree_hash(whole.parent), int(counted.read_text())
    assert calls > 20

    for call in random.Random(calls).choices(range(1, calls + 1), k=KILLS):
        done = run(library, [*command.line, dst], within=dst.parent, kill=call)

        # The number of calls depends on thread scheduling, so another run may need fewer.
        assert done.returncode == KILLED or call > calls - 3, (call, done.stderr)
        command.resume(dst)
        assert tree_hash(dst.parent) == expected, f"killed at call {call} of {calls}"
        _remove(dst.parent)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
