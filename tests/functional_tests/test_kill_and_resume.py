"""A killed conversion leaves nothing that passes for a checkpoint and resumes to the same bytes.

The tests kill real processes at moments all over the run and at named points."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from killing import KILLABLE, KILLED, MARKER, accepted, finish, start
from slow import slow_but
from trees import tree_hash

from megatron_olmo_bridge import (
    ExportOptions,
    ImportOptions,
    WriteOptions,
    export_checkpoint,
    import_checkpoint,
    inspect,
    synth,
    verify,
)
from megatron_olmo_bridge.convert import to_megatron
from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.storage.transfer import Transfer

KILLS = int(os.environ.get("OLMO_BRIDGE_KILLS", "6"))
"""Number of kills spread over a run, for each direction."""
FILE_BYTES = 1 << 20
OVERWRITTEN = "what was there before"


@dataclass(frozen=True)
class Conversion:
    """Conversion of the small model in one direction, into several files."""

    operation: str
    source: Path
    options: ImportOptions | ExportOptions
    """Options of the Python function."""
    arguments: tuple[str, ...]
    """The same options on the command line."""
    uninterrupted: dict[str, str]
    """Hashes of the files that an uninterrupted run writes."""
    writes: int
    """Number of tensor parts that it writes."""

    def start(self, dst: Path, point: str, *flags: str) -> "subprocess.Popen[str]":
        command = [self.operation, self.source, dst, *self.arguments, *flags]
        return start(command, point, FILE_BYTES)

    def run(self, dst: Path, dtype: str = "keep", **write: Any) -> None:
        """Convert in this process."""
        convert = import_checkpoint if self.operation == "import" else export_checkpoint
        convert(self.source, dst, replace(self.options, dtype=dtype), WriteOptions(**write))

    def check(self, dst: Path) -> None:
        """Check that the tree equals the uninterrupted one and that no leftovers remain."""
        assert tree_hash(dst) == self.uninterrupted
        assert [p.name for p in dst.parent.iterdir() if p.name.startswith(dst.name)] == [dst.name]


@pytest.fixture(scope="module", autouse=True)
def small_files() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_megatron, "FILE_BYTES", FILE_BYTES)
        yield


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    root = tmp_path_factory.mktemp("conversions")
    hf = synth("olmo2-tiny", root / "hf", layers=12, max_shard_size="1MB")
    found = {}
    for operation, source, options, arguments in (
        (
            "import",
            hf,
            ImportOptions(make_vocab_size_divisible_by=1280),
            ("--make-vocab-size-divisible-by", "1280"),
        ),
        (
            "export",
            root / "import",
            ExportOptions(max_shard_size="1MB"),
            ("--max-shard-size", "1MB"),
        ),
    ):
        conversion = Conversion(operation, source, options, arguments, {}, 0)
        with pytest.MonkeyPatch.context() as patch:
            writes = counted(patch, Transfer, "write")
            conversion.run(root / operation)
        uninterrupted = tree_hash(root / operation)
        conversion = replace(conversion, uninterrupted=uninterrupted, writes=len(writes))
        weights = [n for n in conversion.uninterrupted if n.endswith((".distcp", ".safetensors"))]
        assert len(weights) > 3
        found[operation] = conversion
    return found


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """Count the calls of a function: the returned list gets an element for each."""
    original, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    patch.setattr(owner, name, call)
    return calls


@pytest.fixture(params=slow_but(["import"], ["import", "export"]))
def conversion(request: pytest.FixtureRequest, conversions: dict[str, Conversion]) -> Conversion:
    return conversions[request.param]


# ------------------------------------------------------------------------------- killed anywhere


def test_killed_at_any_moment(conversion: Conversion, tmp_path: Path) -> None:
    """The kills come before tensors all over the run, with other threads at arbitrary points."""
    for i in range(KILLS):
        dst = tmp_path / f"{i}"
        nth = 1 + conversion.writes * (2 * i + 1) // (2 * KILLS)

        code, said = finish(conversion.start(dst, f"data:{nth}"))

        assert code == KILLED, said
        assert accepted(dst, conversion.source) == []
        conversion.run(dst, resume=True)
        conversion.check(dst)


def test_killed_again_and_again(conversion: Conversion, tmp_path: Path) -> None:
    """Each run keeps what earlier runs completed, so repeated runs finish nevertheless."""
    dst = tmp_path / "dst"
    complete, kills = 0, 0
    while True:
        # Killed before its third file is recorded; the last run has fewer files left.
        code, said = finish(conversion.start(dst, "record:3", "--resume"))
        if code == 0:
            break
        kills += 1
        assert code == KILLED, said
        assert accepted(dst, conversion.source) == []
        journal = (tmp_path / "dst.partial" / MARKER).read_text().splitlines()
        assert len(journal) >= complete + 2
        complete = len(journal)
    assert kills > 1
    conversion.check(dst)


# -------------------------------------------------------------------------- killed at such a place


@pytest.mark.parametrize(
    "point", ["allocated", "data:3", "data:70", "text:1", "text:2", "rename", "tracker", "marker"]
)
@pytest.mark.parametrize("there", slow_but([False], [False, True]), ids=["absent", "empty"])
def test_killed_at(conversion: Conversion, tmp_path: Path, point: str, there: bool) -> None:
    """An empty folder at DST is written in place, so there is nothing to rename."""
    if there and point == "rename":
        pytest.skip("nothing is renamed")
    dst = tmp_path / "dst"
    if there:
        dst.mkdir()

    code, said = finish(conversion.start(dst, point))

    assert code == KILLED, said
    assert accepted(dst, conversion.source) == []
    with pytest.raises(OutputError, match=r"interrupted.*--resume.*--overwrite"):
        conversion.run(dst)
    conversion.run(dst, resume=True)
    conversion.check(dst)


@pytest.mark.parametrize(
    "point", ["allocated", "data:70", "rename:1", "rename:2", "tracker", "removal", "marker"]
)
@pytest.mark.parametrize("again", slow_but(["--resume"], ["--resume", "--overwrite"]))
def test_killed_while_replacing(
    conversion: Conversion, tmp_path: Path, point: str, again: str
) -> None:
    """Until the new output is complete, the old one is kept at DST or DST.replaced."""
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "file").write_text(OVERWRITTEN)

    code, said = finish(conversion.start(dst, point, "--overwrite"))

    assert code == KILLED, said
    renamed = point not in ("allocated", "data:70", "rename:1")
    kept = tmp_path / "dst.replaced" if renamed else dst
    if point not in ("removal", "marker"):
        assert (kept / "file").read_text() == OVERWRITTEN
    assert accepted(dst, conversion.source) == []
    if again == "--resume" and not renamed:
        # DST still has its old content, which only --overwrite allows to replace.
        with pytest.raises(OutputError, match="Pass --overwrite"):
            conversion.run(dst, resume=True)
        assert (dst / "file").read_text() == OVERWRITTEN
        conversion.run(dst, overwrite=True)
    else:
        conversion.run(dst, **{again.removeprefix("--"): True})
    conversion.check(dst)


def test_killed_while_replacing_leftovers(conversion: Conversion, tmp_path: Path) -> None:
    """DST needs only its last step, and DST.partial was to replace it: --resume finishes DST."""
    dst = tmp_path / "dst"
    assert finish(conversion.start(dst, "tracker"))[0] == KILLED
    assert finish(conversion.start(dst, "data:70", "--overwrite"))[0] == KILLED
    assert accepted(dst, conversion.source) == []

    conversion.run(dst, resume=True)

    conversion.check(dst)


def test_killed_while_leftovers_are_removed(conversion: Conversion, tmp_path: Path) -> None:
    """The marker is removed last, so that a partly removed folder never counts as complete."""
    dst = tmp_path / "dst"
    assert finish(conversion.start(dst, "rename"))[0] == KILLED

    code, said = finish(conversion.start(dst, "cleared", "--overwrite"))

    assert code == KILLED, said
    assert [p.name for p in (tmp_path / "dst.partial").iterdir()] == [MARKER]
    assert accepted(dst, conversion.source) == []
    conversion.run(dst, resume=True)
    conversion.check(dst)


def test_leftovers_are_refused_from_inside_and_through_links(
    conversions: dict[str, Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill before the rename, only the marker shows that the complete folder is
    unfinished."""
    dst = tmp_path / "dst"
    assert finish(conversions["import"].start(dst, "rename"))[0] == KILLED
    (tmp_path / "link").symlink_to(tmp_path / "dst.partial" / "iter_0000000")
    monkeypatch.chdir(tmp_path / "link")

    for path in (".", tmp_path / "link", "../iter_0000000"):
        with pytest.raises(InputError, match="an interrupted conversion"):
            inspect(path)


# ------------------------------------------------------------------------------ what resume refuses


def interrupted(conversion: Conversion, dst: Path) -> None:
    assert finish(conversion.start(dst, "data:70"))[0] == KILLED


def test_resume_is_refused_with_other_options(conversion: Conversion, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    interrupted(conversion, dst)
    before = tree_hash(tmp_path)

    with pytest.raises(OutputError, match=r"dst.partial: .*begun with other options.*--overwrite"):
        conversion.run(dst, dtype="float32", resume=True)

    assert tree_hash(tmp_path) == before
    conversion.run(dst, resume=True)
    conversion.check(dst)


def test_resume_is_refused_with_another_source(conversion: Conversion, tmp_path: Path) -> None:
    """The source has the same headers and times but was rewritten, so its values may differ."""
    source = Path(shutil.copytree(conversion.source, tmp_path / "source"))
    conversion, dst = replace(conversion, source=source), tmp_path / "dst"
    interrupted(conversion, dst)
    file = next(source.rglob("*-00002-*" if conversion.operation == "import" else "__*"))
    before, status = tree_hash(tmp_path), file.stat()

    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(OutputError, match="begun from other source files, or these have changed"):
        conversion.run(dst, resume=True)
    assert tree_hash(tmp_path) == before
    conversion.run(dst, overwrite=True)
    assert verify(source, dst).equal


def test_resume_without_an_interrupted_run_starts_from_the_beginning(
    conversion: Conversion, tmp_path: Path
) -> None:
    conversion.run(tmp_path / "dst", resume=True)

    conversion.check(tmp_path / "dst")


def test_resume_of_a_complete_output_does_nothing(conversion: Conversion, tmp_path: Path) -> None:
    """A loop of retries must end wherever the last kill came."""
    dst = tmp_path / "dst"
    conversion.run(dst)
    before = tree_hash(tmp_path)

    conversion.run(dst, resume=True)

    assert tree_hash(tmp_path) == before
    with pytest.raises(OutputError, match="exists already"):
        conversion.run(dst, dtype="float32", resume=True)


def test_resume_after_a_kill_before_the_first_journal_entry(
    conversion: Conversion, tmp_path: Path
) -> None:
    """Only the folder exists, with or without its marker."""
    for name, marked in (("a", False), ("b", True)):
        (tmp_path / f"{name}.partial").mkdir()
        if marked:
            (tmp_path / f"{name}.partial" / MARKER).touch()

        conversion.run(tmp_path / name, resume=True)

        conversion.check(tmp_path / name)


# --------------------------------------------------------------------- Ctrl-C, and two runs at once


@pytest.fixture
def ctrl_c_is_received() -> Iterator[None]:
    """Restore SIGINT, which a shell makes background processes and their children ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stopped(conversion: Conversion, dst: Path) -> Iterator[Any]:
    """Start a run that is stopped after its first file is journaled, and continue it on exit."""
    process = conversion.start(dst, "stopped")
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.usefixtures("ctrl_c_is_received")
def test_ctrl_c(conversion: Conversion, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    with stopped(conversion, dst) as process:
        assert len((tmp_path / "dst.partial" / MARKER).read_text().splitlines()) > 1
        process.send_signal(signal.SIGINT)
    code, said = finish(process)

    assert code == 130
    assert said.splitlines()[-1].startswith("olmo-bridge: interrupted")
    assert "--resume" in said
    assert "Traceback" not in said
    assert accepted(dst, conversion.source) == []
    conversion.run(dst, resume=True)
    conversion.check(dst)


@pytest.mark.usefixtures("ctrl_c_is_received")
def test_ctrl_c_in_python_leaves_no_lock(
    conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook the process survives Ctrl-C and can resume the run."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "megatron_olmo_bridge.storage.execute._describe", lambda *_: signal.raise_signal(2)
        )
        with pytest.raises(KeyboardInterrupt):
            conversion.run(tmp_path / "dst")

    conversion.run(tmp_path / "dst", resume=True)

    conversion.check(tmp_path / "dst")


def test_two_runs_at_once(conversion: Conversion, tmp_path: Path) -> None:
    """The second run is refused, with or without --resume or --overwrite."""
    dst = tmp_path / "dst"
    with stopped(conversion, dst) as process:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match="another olmo-bridge is writing here right now"):
                conversion.run(dst, **options)

    assert finish(process)[0] == 0
    conversion.check(dst)


# ------------------------------------------------------------------- the same bytes by other means


@pytest.mark.parametrize("workers", slow_but([3], [2, 3, 7]))
def test_same_bytes_whatever_the_workers(
    conversion: Conversion, tmp_path: Path, workers: int
) -> None:
    conversion.run(tmp_path / "dst", workers=workers)

    conversion.check(tmp_path / "dst")


@pytest.mark.parametrize("there", slow_but([False], [False, True]), ids=["begun", "empty"])
def test_same_bytes_under_torchrun(conversion: Conversion, tmp_path: Path, there: bool) -> None:
    """Two processes divide the files, and resume and finish a run that one process began, or write
    all files into an empty folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [conversion.operation, str(conversion.source), str(tmp_path / "dst")]
    command += [*conversion.arguments, "--resume"]
    if there:
        (tmp_path / "dst").mkdir()
    else:
        interrupted(conversion, tmp_path / "dst")
    program = [str(KILLABLE), "none", str(FILE_BYTES)]
    if conversion.operation == "export":  # export has several files by itself
        program = ["-m", "megatron_olmo_bridge"]

    done = subprocess.run([*torchrun, *program, *command], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensors, ") == 1, "only one process prints the summary"
    conversion.check(tmp_path / "dst")


def test_same_bytes_by_any_way_of_copying(
    conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is the same without the kernel's copy functions, as on macOS, or preallocation."""
    for missing in ("copy_file_range", "sendfile", "preadv", "posix_fallocate"):
        monkeypatch.delattr(os, missing, raising=False)
        dst = tmp_path / missing

        conversion.run(dst)

        conversion.check(dst)


def test_import_and_export_give_the_same_bytes(
    conversions: dict[str, Conversion], tmp_path: Path
) -> None:
    """The reference of the tests above is right: exporting the import gives the source."""
    conversions["export"].run(tmp_path / "dst")

    assert verify(conversions["import"].source, tmp_path / "dst").equal
