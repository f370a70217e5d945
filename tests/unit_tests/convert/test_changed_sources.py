"""A source that changes while it is copied: an error that names the file, and no output."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, verify
from megatron_olmo_bridge.convert.average import average_checkpoints
from megatron_olmo_bridge.convert.options import ExportOptions
from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.progress import Reporter


class Once(Reporter):
    """Does something when the first bytes were copied."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change: Callable[[], object] | None = change

    def advance(self, done: int) -> None:
        if done and self._change is not None:
            change, self._change = self._change, None
            change()


def flip(file: Path) -> None:
    """Change the last byte, and set the times back."""
    status = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        (last,) = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


SOURCES = {
    "import": [
        "model-00002-of-00005.safetensors", "config.json", "generation_config.json",
        "model.safetensors.index.json",
    ],
    "export": [
        "iter_0000000/__0_0.distcp", "iter_0000000/.metadata", "iter_0000000/common.pt",
        "iter_0000000/run_config.yaml", "iter_0000000/hf/config.json",
        "iter_0000000/hf/generation_config.json",
    ],
    "average": ["model-00001-of-00005.safetensors", "config.json"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "name"), [(o, name) for o, names in SOURCES.items() for name in names]
)
def test_a_change_of_each_kind_of_file_is_refused(
    operation: str, name: str, tiny_hf: Path, tiny_megatron: Path, tmp_path: Path
) -> None:
    original = tiny_megatron if operation == "export" else tiny_hf
    source = Path(shutil.copytree(original, tmp_path / "source"))
    dst = tmp_path / "dst"
    convert: dict[str, Callable[[Reporter], object]] = {
        "import": lambda reporter: import_checkpoint(source, dst, reporter=reporter),
        "export": lambda reporter: export_checkpoint(source, dst, reporter=reporter),
        "average": lambda reporter: average_checkpoints([tiny_hf, source], dst, reporter=reporter),
    }

    with pytest.raises(InputError, match=rf"source/{name}: changed while the checkpoint was read"):
        convert[operation](Once(lambda: flip(source / name)))

    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is left of the output"


def test_a_file_that_is_replaced_by_a_similar_one_is_refused(tiny_hf: Path, tmp_path: Path) -> None:
    """The old one is read to its end, as it is open; the others may be of the new checkpoint."""
    source = Path(shutil.copytree(tiny_hf, tmp_path / "source"))
    file = source / "model-00003-of-00005.safetensors"
    shutil.copy2(file, tmp_path / "other")

    with pytest.raises(InputError, match=f"{file.name}: changed while"):
        import_checkpoint(
            source, tmp_path / "dst", reporter=Once(lambda: (tmp_path / "other").rename(file))
        )


def test_a_log_beside_the_weights_may_grow(tiny_hf: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_hf, tmp_path / "source"))

    import_checkpoint(
        source, tmp_path / "dst", reporter=Once(lambda: (source / "log.txt").write_text("..."))
    )

    assert verify(source, tmp_path / "dst").equal


def test_verify_refuses_changed_sources_too(tiny_hf: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_hf, tmp_path / "source"))
    file = source / "model-00001-of-00005.safetensors"

    with pytest.raises(InputError, match=f"{file.name}: changed while"):
        verify(tiny_hf, source, reporter=Once(lambda: flip(file)))


# ----------------------------------------------------------- between a finished run and --resume

REFUSED = "exists already. Pass --overwrite to replace it. It is not what --resume would complete"


@pytest.mark.parametrize("name", ["model-00002-of-00005.safetensors", "generation_config.json"])
@pytest.mark.parametrize("operation", ["import", "average"])
def test_a_finished_output_of_a_changed_source(
    operation: str, name: str, tiny_hf: Path, tmp_path: Path
) -> None:
    source, dst = Path(shutil.copytree(tiny_hf, tmp_path / "source")), tmp_path / "dst"

    def convert(resume: bool = False) -> None:
        if operation == "import":
            import_checkpoint(source, dst, write=WriteOptions(resume=resume))
        else:
            average_checkpoints([source, tiny_hf], dst, write=WriteOptions(resume=resume))

    convert()
    convert(resume=True)  # nothing to do
    if name.endswith(".json"):
        (source / name).write_text((source / name).read_text() + "\n")
    else:
        flip(source / name)

    with pytest.raises(OutputError, match=REFUSED):
        convert(resume=True)


def test_a_finished_output_of_another_iteration(tiny_megatron: Path, tmp_path: Path) -> None:
    run, dst = Path(shutil.copytree(tiny_megatron, tmp_path / "run")), tmp_path / "dst"
    shutil.copytree(run / "iter_0000000", run / "iter_0000001")
    export_checkpoint(run, dst)
    export_checkpoint(
        run, dst, ExportOptions(iteration=0), WriteOptions(resume=True)
    )  # nothing to do

    with pytest.raises(OutputError, match=REFUSED):
        export_checkpoint(run, dst, ExportOptions(iteration=1), WriteOptions(resume=True))
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(OutputError, match=REFUSED):
        export_checkpoint(run, dst, write=WriteOptions(resume=True))


def test_a_finished_output_of_another_config(tiny_megatron: Path, tmp_path: Path) -> None:
    config = Path(shutil.copytree(tiny_megatron / "iter_0000000" / "hf", tmp_path / "config"))
    export_checkpoint(tiny_megatron, tmp_path / "dst", ExportOptions(hf_config=config))
    (config / "generation_config.json").write_text('{"eos_token_id": 5}')

    with pytest.raises(OutputError, match=REFUSED):
        export_checkpoint(
            tiny_megatron,
            tmp_path / "dst",
            ExportOptions(hf_config=config),
            WriteOptions(resume=True),
        )
