"""A Git LFS pointer is called one, whatever file it stands for."""

import shutil
from pathlib import Path

import pytest

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, inspect
from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.files import refuse_pointer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    f"oid sha256:{'4' * 64}\n"
    "size 2098000\n"
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00001-of-00005.safetensors",
     "tokenizer.json", "tokenizer.model", "generation_config.json",
     "additional_chat_templates/tool_use.jinja"],
)  # fmt: skip
def test_in_a_hugging_face_folder(tiny_hf: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_hf, tmp_path / "hf"))
    if name.startswith("model-"):
        assert (folder / name).exists()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(POINTER)
    with pytest.raises(FormatError, match=f"{folder / name}: a Git LFS pointer.*git lfs pull"):
        import_checkpoint(folder, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "name",
    ["__0_0.distcp", ".metadata", "metadata.json", "common.pt", "run_config.yaml",
     "hf/config.json", "hf/generation_config.json"],
)  # fmt: skip
def test_in_a_megatron_checkpoint(tiny_megatron: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(tiny_megatron, tmp_path / "m"))
    (root / "iter_0000000" / name).write_text(POINTER)
    with pytest.raises(FormatError, match=f"{name}: a Git LFS pointer"):
        export_checkpoint(root, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_of_olms_trainer(tmp_path: Path) -> None:
    (tmp_path / "step_1.pt").write_text(POINTER)
    with pytest.raises(FormatError, match=r"step_1\.pt: a Git LFS pointer"):
        inspect(tmp_path / "step_1.pt", ReadOptions(kind_options={"heads": 4}))


def test_a_file_that_only_begins_so_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "long").write_text(POINTER + "x" * 1024)
    refuse_pointer(tmp_path / "long")
    (tmp_path / "empty").touch()
    refuse_pointer(tmp_path / "empty")
