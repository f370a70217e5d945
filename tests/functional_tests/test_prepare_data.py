"""prepare-data writes the same bytes with any number of workers and after a kill."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import wait_until
from megatron.core.datasets.indexed_dataset import IndexedDataset
from slow import slow_but
from small_tokenizer import make_tokenizer, texts
from transformers import AutoTokenizer

from megatron_olmo_bridge.data.info import read_info
from megatron_olmo_bridge.data.options import PrepareOptions
from megatron_olmo_bridge.data.prepare import prepare_data
from megatron_olmo_bridge.errors import InputError

DOCUMENTS = 30_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a corpus of several parts, a tokenizer, and the output of one process."""
    folder = tmp_path_factory.mktemp("data")
    make_tokenizer(folder / "tokenizer")
    lines = (json.dumps({"text": t}, ensure_ascii=False) for t in texts(DOCUMENTS))
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    assert (folder / "corpus.jsonl").stat().st_size > 5 << 20
    prepare_data(
        [folder / "corpus.jsonl"],
        folder / "one",
        PrepareOptions(tokenizer=folder / "tokenizer", workers=1),
    )
    return folder


def same(folder: Path, out: Path) -> bool:
    return all(
        Path(f"{out}{s}").read_bytes() == (folder / f"one{s}").read_bytes()
        for s in (".bin", ".idx", ".json")
    )


def start(
    folder: Path,
    out: Path,
    *options: str,
    before: Callable[[], None] | None = None,
    stopped: bool = False,
) -> subprocess.Popen[str]:
    """Start the command with two workers in a separate session, through ``prepare_stopped.py``."""
    command = ["-m", "megatron_olmo_bridge", "prepare-data"]
    if stopped:
        command = [str(Path(__file__).with_name("prepare_stopped.py")), str(out)]
    return subprocess.Popen(
        [
            sys.executable,
            *command,
            folder / "corpus.jsonl",
            out,
            "--tokenizer",
            folder / "tokenizer",
            "--workers",
            "2",
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )


def nobody_left(session: int) -> bool:
    """Return whether all processes of a session are gone."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return True
    return False


def children(process: int) -> list[int]:
    """Return the child processes, oldest first."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(p) for p in found if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]


def test_stock_megatron_reads_the_tokens_of_transformers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    stock = IndexedDataset(str(folder / "one"))
    assert len(stock) == DOCUMENTS
    for i, text in enumerate(texts(DOCUMENTS)[:500]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert stock[i].tolist() == [*ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("workers", slow_but([2], [2, 3]))
def test_any_number_of_workers_writes_the_same_bytes(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    prepare_data(
        [folder / "corpus.jsonl"],
        tmp_path / "out",
        PrepareOptions(tokenizer=folder / "tokenizer", workers=workers),
    )
    assert same(folder, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_and_resumed_run_writes_the_same_bytes(
    folder: Path, tmp_path: Path, by: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(folder, out, stopped=True)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert children(process.pid)
    os.kill(process.pid, by)
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate()
    assert process.returncode == (130 if by is signal.SIGINT else -by), said
    wait_until(lambda: nobody_left(process.pid))  # no worker outlives the command
    if by is signal.SIGINT:
        assert said.endswith(
            "olmo-bridge: interrupted. Run the same command with --resume to continue.\n"
        )
    with pytest.raises(InputError, match="an interrupted prepare-data"):
        read_info(out)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out.partial/part-*.json")}
    assert finished
    process = start(folder, out, "--resume")
    said = "".join(process.communicate())
    assert process.returncode == 0, said
    assert same(folder, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]


def test_a_worker_that_dies_is_reported(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path / "out")
    wait_until(lambda: children(process.pid))
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 2
    assert "a process that tokenizes died" in said
    assert "Traceback" not in said
    wait_until(lambda: nobody_left(process.pid))


@pytest.mark.slow
def test_a_full_disk_is_reported(folder: Path, tmp_path: Path) -> None:
    limit = (folder / "one.bin").stat().st_size // 2  # enough for some parts, not for all
    process = start(
        folder,
        tmp_path / "out",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.endswith(
        f"olmo-bridge: {tmp_path / 'out'}.partial: can't write more: File too large. Make room and "
        "pass --resume: finished parts are kept.\n"
    )
    assert "Traceback" not in said
    process = start(folder, tmp_path / "out", "--resume")
    assert process.wait() == 0
    assert same(folder, tmp_path / "out")
