"""A new kind of checkpoint is one class in ``KINDS``: every command reads it then."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from megatron_olmo_bridge import ExportOptions, ReadOptions, export_checkpoint, verify
from megatron_olmo_bridge.checkpoints import open as opening
from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, KindOption
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.cli import checks, conversion
from megatron_olmo_bridge.cli.command import CommandGroup
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.tensors import StoredArray, TensorView
from megatron_olmo_bridge.models.families import bridge_for


@dataclass(frozen=True, kw_only=True)
class FlatCheckpoint(Checkpoint):
    """One file: the config as JSON with its length before it, then every tensor in its order."""

    kind: ClassVar[str] = "flat"
    looks_like: ClassVar[str] = "a file model.flat"
    own_options: ClassVar[tuple[KindOption, ...]] = (
        KindOption("skip", int, "Bytes before the config.", 0),
    )

    begin: int
    """Byte at which the tensors begin."""

    @classmethod
    def find(cls, path: Path, iteration: int | str | None) -> Path | None:
        return path if path.suffix == ".flat" else None

    @classmethod
    def file_patterns(cls, path: Path) -> dict[Path, tuple[str, ...]]:
        return {path.parent: (path.name,)}

    @classmethod
    def open(cls, path: Path, options: ReadOptions, strict: bool) -> "FlatCheckpoint":
        data = path.read_bytes()[options.kind_options.get("skip", 0) :]
        (length,) = struct.unpack_from("<q", data)
        bridge = bridge_for(json.loads(data[8 : 8 + length]), path)
        return cls(
            path=path,
            bridge=bridge,
            mapping=bridge.mapping_registry().resolve(),
            config_from=path,
            artifacts_folder=None,
            begin=path.stat().st_size - len(data) + 8 + length,
        )

    @cached_property
    def tensors(self) -> dict[str, TensorView]:
        views, offset = {}, self.begin
        for name, shape in self.mapping.hf_shapes.items():
            array = StoredArray(self.path, offset, shape, "float32")
            views[name] = TensorView.of_array(name, array)
            offset += array.nbytes
        return views

    @property
    def layout(self) -> str:
        return "one flat file"


@pytest.fixture
def hf(make_hf: Callable[..., Path]) -> Path:
    return make_hf()


@pytest.fixture
def flat(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same model as ``hf``, after 3 bytes of something else."""
    monkeypatch.setattr(opening, "KINDS", (FlatCheckpoint, *opening.KINDS))
    config = (hf / "config.json").read_bytes()
    tensors = load_file(hf / "model.safetensors")
    order = open_checkpoint(hf).mapping.hf_shapes
    file = tmp_path / "model.flat"
    with file.open("wb") as out:
        out.write(b"..." + struct.pack("<q", len(config)) + config)
        for name in order:
            out.write(tensors[name].numpy().tobytes())
    yield file


def run(*words: object) -> str:
    app = typer.Typer(cls=CommandGroup)
    conversion.add_to(app)
    checks.add_to(app)
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_line_reads_it_and_has_its_option(hf: Path, flat: Path, tmp_path: Path) -> None:
    run("import", flat, tmp_path / "megatron", "--skip", 3)
    run("export", flat, tmp_path / "exported", "--skip", 3)
    for made in ("megatron", "exported"):
        assert "Equal" in run("verify", hf, tmp_path / made)
    assert "Equal" in run("verify", hf, flat, "--skip", 3)
    assert "flat, one flat file" in run("inspect", flat, "--skip", 3)
    assert "Bytes before the config." in " ".join(run("inspect", "--help").split())


def test_the_python_api_reads_it(hf: Path, flat: Path, tmp_path: Path) -> None:
    export_checkpoint(flat, tmp_path / "out", ExportOptions(kind_options={"skip": 3}))
    assert (tmp_path / "out/model.safetensors").exists()


def test_verify_refuses_an_option_that_neither_checkpoint_accepts(hf: Path, flat: Path) -> None:
    with pytest.raises(InputError, match="--skip is for flat checkpoints; this is Hugging Face"):
        verify(hf, hf, ReadOptions(kind_options={"skip": 3}))


def test_other_kinds_refuse_its_option(hf: Path, flat: Path) -> None:
    with pytest.raises(InputError, match="--skip is for flat checkpoints; this is Hugging Face"):
        open_checkpoint(hf, ReadOptions(kind_options={"skip": 3}))


def test_an_option_of_no_kind_is_refused(hf: Path, flat: Path) -> None:
    with pytest.raises(InputError, match="no kind of checkpoint has an option 'skipp'"):
        open_checkpoint(hf, ReadOptions(kind_options={"skipp": 3}))
