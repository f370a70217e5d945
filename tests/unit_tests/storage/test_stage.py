"""Where a conversion's output goes, and what it does with what is there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, verify
from megatron_olmo_bridge.convert.average import average_checkpoints
from megatron_olmo_bridge.convert.options import AverageOptions, ExportOptions
from megatron_olmo_bridge.convert.to_megatron import plan_import
from megatron_olmo_bridge.errors import FormatError, OutputError
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER, Stage
from megatron_olmo_bridge.tools.synth import synth

Convert = Callable[..., object]


@pytest.fixture(params=["import", "export", "export of all iterations", "average"])
def convert(request: pytest.FixtureRequest, tiny_hf: Path, tiny_megatron: Path) -> Convert:
    """A conversion of the tiny model into a folder."""
    every = ExportOptions(iteration="all")
    conversions: dict[str, Convert] = {
        "import": lambda dst, *how: import_checkpoint(tiny_hf, dst, None, *how),
        "export": lambda dst, *how: export_checkpoint(tiny_megatron, dst, None, *how),
        "export of all iterations": lambda dst, *how: export_checkpoint(
            tiny_megatron, dst.parent, every, *how
        ),
        "average": lambda dst, *how: average_checkpoints([tiny_hf] * 2, dst, None, *how),
    }
    conversion = conversions[str(request.param)]

    def run(dst: Path, reporter: Reporter | None = None, **write: Any) -> object:
        return conversion(dst, WriteOptions(**write), reporter)

    return run


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty folder; named as ``--iteration all`` names the one for the tiny model's."""
    folder = tmp_path / "all" / "iter_0000000"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=repr)
def test_an_empty_folder_is_written_into(
    convert: Convert, empty: Path, tiny_hf: Path, options: dict[str, Any]
) -> None:
    empty.chmod(0o2770)
    before = empty.stat()

    convert(empty, **options)

    assert verify(tiny_hf, empty).equal
    assert list(empty.parent.iterdir()) == [empty], "nothing lies beside it"
    assert not (empty / PARTIAL_MARKER).exists()
    after = empty.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode), "it is the same folder"


def test_the_working_directory_is_written_into(
    empty: Path, tiny_hf: Path, tiny_megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(empty)

    export_checkpoint(tiny_megatron, ".")

    assert Path("config.json").is_file(), "it is still the working directory"
    assert verify(tiny_hf, ".").equal


def test_an_empty_folder_is_written_into_through_a_link(
    convert: Convert, empty: Path, tiny_hf: Path
) -> None:
    target = empty.parent.parent / "elsewhere"
    empty.rename(target)
    empty.symlink_to(target)

    convert(empty)

    assert empty.is_symlink()
    assert verify(tiny_hf, target).equal


@pytest.mark.parametrize("name", ["lost+found/", ".hidden", "notes.txt"])
def test_a_folder_with_anything_in_it_is_not_empty(
    convert: Convert, empty: Path, name: str
) -> None:
    (empty / name).mkdir() if name.endswith("/") else (empty / name).write_text("mine")

    for options in ({}, {"resume": True}):
        with pytest.raises(OutputError, match=r"exists already. Pass --overwrite"):
            convert(empty, **options)

    assert [p.name for p in empty.iterdir()] == [name.rstrip("/")]


def test_an_output_below_a_file_names_the_file(convert: Convert, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("not a folder")

    with pytest.raises(OutputError, match=f"{file} is a file; name another folder"):
        convert(file / "runs" / "out")

    assert file.read_text() == "not a folder"


def test_an_error_leaves_an_empty_folder_as_it_was(tiny_hf: Path, empty: Path) -> None:
    source = Path(shutil.copytree(tiny_hf, empty.parent / "source"))

    class Truncating(Reporter):
        """Cuts the source while it is read."""

        def begin(self, what: str, total: int) -> None:
            for file in source.glob("*.safetensors"):
                os.truncate(file, 4096)

    with pytest.raises(FormatError, match="truncated"):
        import_checkpoint(source, empty, reporter=Truncating())

    assert list(empty.iterdir()) == []


class Interfering(Reporter):
    """Stands for another program that changes the output, with the last bytes or after them."""

    def __init__(self, change: Callable[[], object], *, when: str) -> None:
        self._change, self._when, self._left = change, when, 0

    def begin(self, what: str, total: int) -> None:
        self._left = total

    def advance(self, done: int) -> None:
        self._left -= done
        if self._when == "writing" and self._left == 0:
            self._change()

    def end(self) -> None:
        if self._when == "after":
            self._change()


@pytest.mark.parametrize("when", ["writing", "after"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_output_that_lacks_something_is_an_error(
    tiny_megatron: Path, tmp_path: Path, in_place: bool, when: str
) -> None:
    dst = tmp_path / "dst"
    if in_place:
        dst.mkdir()
    written = dst if in_place or when == "after" else tmp_path / "dst.partial"
    first = "model-00001-of-00003.safetensors"

    def convert(reporter: Reporter | None = None, overwrite: bool = False) -> None:
        write = WriteOptions(workers=1, overwrite=overwrite)
        options = ExportOptions(max_shard_size="800KB")
        export_checkpoint(tiny_megatron, dst, options, write, reporter)

    truncate = Interfering(lambda: os.truncate(written / first, 7), when=when)
    with pytest.raises(OutputError, match=rf"- {first} has 7 bytes, not \d+\n.*--overwrite"):
        convert(reporter=truncate)

    assert dst.exists() == (in_place or when == "after")
    convert(overwrite=True)
    assert verify(tiny_megatron, dst).equal


def test_an_output_without_one_of_its_small_files_is_an_error(
    tiny_megatron: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "dst"
    remove = Interfering(lambda: (dst / "config.json").unlink(), when="after")

    with pytest.raises(OutputError, match=r"dst: .*\n  - config.json is absent\n"):
        export_checkpoint(tiny_megatron, dst, reporter=remove)


def test_a_finished_output_that_lost_a_file_is_not_finished(
    tiny_megatron: Path, tmp_path: Path
) -> None:
    export_checkpoint(tiny_megatron, tmp_path / "dst")
    (tmp_path / "dst/generation_config.json").unlink()

    with pytest.raises(OutputError, match="exists already"):
        export_checkpoint(tiny_megatron, tmp_path / "dst", write=WriteOptions(resume=True))


def test_the_finished_output_of_another_source_is_not_taken_for_this_one(
    tiny_hf: Path, tiny_megatron: Path, tmp_path: Path
) -> None:
    """The headers are the same: only paths and times tell the sources apart."""
    other_hf = synth("olmo2-tiny", tmp_path / "hf", seed=1, max_shard_size="500KB")
    other_megatron = tmp_path / "megatron"
    import_checkpoint(other_hf, other_megatron)
    export_checkpoint(tiny_megatron, tmp_path / "exported")
    average_checkpoints([tiny_hf, other_hf], tmp_path / "mean", AverageOptions(weights=[1, 2]))
    refused = r"exists already. Pass --overwrite .* It is not what --resume would complete"

    with pytest.raises(OutputError, match=refused):
        import_checkpoint(tiny_hf, other_megatron, write=WriteOptions(resume=True))
    with pytest.raises(OutputError, match=refused):
        export_checkpoint(other_megatron, tmp_path / "exported", write=WriteOptions(resume=True))
    with pytest.raises(OutputError, match=refused):
        average_checkpoints(
            [other_hf, tiny_hf],
            tmp_path / "mean",
            AverageOptions(weights=[1, 2]),
            WriteOptions(resume=True),
        )


def test_a_finished_output_is_not_taken_for_that_of_a_source_written_anew(tmp_path: Path) -> None:
    source = synth("olmo2-tiny", tmp_path / "hf")
    import_checkpoint(source, tmp_path / "dst")
    import_checkpoint(source, tmp_path / "dst", write=WriteOptions(resume=True))  # nothing to do

    shutil.rmtree(source)
    synth("olmo2-tiny", source, seed=1)

    with pytest.raises(OutputError, match="exists already"):
        import_checkpoint(source, tmp_path / "dst", write=WriteOptions(resume=True))


def test_what_another_program_left_half_written_is_not_resumed(
    tiny_megatron: Path, tmp_path: Path
) -> None:
    """A live model's save marks its folder too, and doesn't say what it writes."""
    dst = tmp_path / "dst"
    shutil.copytree(tiny_megatron, dst)
    (dst / PARTIAL_MARKER).touch()

    with pytest.raises(OutputError, match=r"begun with other options.*--overwrite"):
        export_checkpoint(tiny_megatron, dst, write=WriteOptions(resume=True))

    assert (dst / "iter_0000000/metadata.json").is_file()


def test_a_journal_that_changed_before_it_was_locked_is_not_continued(
    tiny_hf: Path, tmp_path: Path
) -> None:
    """Another run may have started over in the same folder since the journal was read."""
    plan, _ = plan_import(tiny_hf)
    interrupted = Stage(tmp_path / "dst", plan, resume=False, overwrite=False)
    interrupted.open()
    interrupted.record(plan.files[0].name)
    interrupted.close()
    resumed = Stage(tmp_path / "dst", plan, resume=True, overwrite=False)
    assert resumed.complete == {plan.files[0].name}
    with (tmp_path / "dst.partial" / PARTIAL_MARKER).open("a") as journal:
        journal.write("[]\n")
    with pytest.raises(OutputError, match="another olmo-bridge was writing here just now"):
        resumed.open()
    Stage(tmp_path / "dst", plan, resume=True, overwrite=False).open()
