"""Hugging Face folders: config, shards and their index."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_olmo_bridge.errors import FormatError, InputError, UnsupportedError
from megatron_olmo_bridge.formats.files import ARTIFACT_FILES_LIMIT
from megatron_olmo_bridge.formats.hf_folder import (
    HFFolder,
    artifact_files,
    is_hf_folder,
    read_config,
)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "any"}')
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(4)}, tmp_path / "two.safetensors")
    write_index(tmp_path, a="one.safetensors", b="one.safetensors", c="two.safetensors")
    return tmp_path


def write_index(folder: Path, **weight_map: Any) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reads_the_shards_of_an_index(sharded: Path) -> None:
    folder = HFFolder.read(sharded)
    assert {n: (a.shape, a.file.name) for n, a in folder.arrays.items()} == {
        "a": ((2,), "one.safetensors"),
        "b": ((3,), "one.safetensors"),
        "c": ((4,), "two.safetensors"),
    }
    assert [f.name for f in folder.shards] == ["one.safetensors", "two.safetensors"]
    assert folder.config == {"model_type": "any"}


def test_reads_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert HFFolder.read(sharded).arrays.keys() == {"a", "b", "c"}


def test_a_single_file_is_all_there_is(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    save_file({"only": torch.zeros(2)}, sharded / "model.safetensors")
    assert HFFolder.read(sharded).arrays.keys() == {"only"}


def test_a_file_that_the_index_does_not_name_is_not_read(sharded: Path) -> None:
    save_file({"a": torch.zeros(9)}, sharded / "consolidated.safetensors")
    assert HFFolder.read(sharded).arrays["a"].shape == (2,)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, None),
        ({"a": "one.safetensors"}, "tensor b is in one.safetensors, the index says nowhere"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
         "tensor b is in one.safetensors, the index says in two.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors", "d": "one.safetensors"},
         "tensor d is not in one.safetensors, where it should be"),
        ({"a": "three.safetensors"}, "names three.safetensors, absent here"),
        ({"a": "../one.safetensors"}, "tensor a would be in '../one.safetensors'"),
        ({"a": "/etc/one.safetensors"}, "tensor a would be in '/etc/one.safetensors'"),
        ({"a": ".."}, "tensor a would be in"),
        ({"a": 3}, "tensor a would be in 3"),
        ({"a": "a\x00"}, r"tensor a would be in 'a\x00'"),
        ({"a": "a" * 256}, "tensor a would be in 'aaa"),
        ({}, "has no weight_map"),
    ],
)  # fmt: skip
def test_index_and_shards_must_agree(
    sharded: Path, weight_map: dict[str, Any], says: str | None
) -> None:
    write_index(sharded, **weight_map)
    if says is None:
        assert HFFolder.read(sharded).arrays.keys() == {"a", "b"}
        return
    with pytest.raises(FormatError) as caught:
        HFFolder.read(sharded)
    assert says in str(caught.value)
    assert "model.safetensors.index.json" in str(caught.value)


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    save_file({"c": torch.zeros(4)}, sharded / "three.safetensors")
    with pytest.raises(FormatError, match=r"tensor c stands in three\.safetensors as well"):
        HFFolder.read(sharded)


def test_index_and_its_files_beside_a_single_file_are_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(2)}, sharded / "model.safetensors")
    with pytest.raises(FormatError, match=r"has both model\.safetensors and .* Remove the single"):
        HFFolder.read(sharded)


def test_a_stale_index_beside_a_single_file_is_not_read(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    save_file({"a": torch.zeros(2)}, sharded / "model.safetensors")
    assert {n: a.shape for n, a in HFFolder.read(sharded).arrays.items()} == {"a": (2,)}


def test_an_index_may_name_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_index(tmp_path, a="model.safetensors")
    assert HFFolder.read(tmp_path).arrays.keys() == {"a"}


@pytest.mark.parametrize("file", ["two.safetensors", "three.safetensors"])
def test_an_index_may_name_a_tied_tensor_that_no_file_has(sharded: Path, file: str) -> None:
    write_index(sharded, a="one.safetensors", b="one.safetensors", c="two.safetensors", tied=file)
    read = HFFolder.read(sharded, may_be_tied=lambda name: name == "tied")
    assert read.arrays.keys() == {"a", "b", "c"}


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lambda f: (f / "config.json").unlink(), InputError, "no config.json"),
        (write("config.json", "{"), FormatError, "config.json: not sound JSON"),
        (write("config.json", "[]"), FormatError, "config.json: does not hold a JSON object"),
        (write("adapter_config.json", "{}"), UnsupportedError, "LoRA"),
        (write("config.json", '{"quantization_config": {"quant_method": "gptq"}}'),
         UnsupportedError, "quantized (gptq)"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(
    sharded: Path, change: Callable[[Path], object], kind: type[Exception], says: str
) -> None:
    change(sharded)
    with pytest.raises(kind) as caught:
        HFFolder.read(sharded)
    assert says in str(caught.value)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has a config\.json but no safetensors files"):
        HFFolder.read(tmp_path)


def test_bin_files_are_refused_but_not_beside_safetensors(tmp_path: Path, sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"")
    assert HFFolder.read(sharded).arrays
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"pytorch_model-00001-of-00002\.bin: PyTorch"):
        HFFolder.read(other)


def test_artifact_files_are_those_of_save_pretrained(tmp_path: Path) -> None:
    ours = [
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    for name in [*ours, "README.md", "model.safetensors", "training_args.bin", "notes.txt"]:
        (tmp_path / name).write_text("x")
    (tmp_path / "tokenizer").mkdir()
    assert artifact_files(tmp_path) == dict.fromkeys(ours, b"x")


@pytest.mark.parametrize(
    ("read", "name"),
    [(HFFolder.read, b"w\xff.safetensors"), (artifact_files, b"tokenizer\xff.json")],
)
def test_file_names_that_are_not_utf8_are_refused(
    tmp_path: Path, read: Callable[[Path], object], name: bytes
) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.st")
    (tmp_path / "model.st").rename(tmp_path / os.fsdecode(name))
    with pytest.raises(FormatError, match=r"its name, .* is not UTF-8"):
        read(tmp_path)


def test_code_is_a_models_own_where_a_config_names_it(tmp_path: Path) -> None:
    for name in ("modeling_own.py", "config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert "modeling_own.py" not in artifact_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {}}')
    assert "modeling_own.py" in artifact_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", True),
        ("a.safetensors", True),
        ("model.safetensors.index.json", True),
        ("README.md", False),
    ],
)
def test_is_hf_folder(tmp_path: Path, name: str, expected: bool) -> None:
    (tmp_path / name).write_text("{}")
    assert is_hf_folder(tmp_path) is expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config, and beside it a file that is not the folder's."""
    (tmp_path / "secret").write_text('{"password": 1}')
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "additional_chat_templates/a.jinja"]
)
@pytest.mark.parametrize("target", ["absolute", "relative", "by way of another link"])
def test_a_link_that_leads_out_of_the_folder_is_refused(
    folder: Path, name: str, target: str
) -> None:
    secret, file = folder.parent / "secret", folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if target == "absolute":
        file.symlink_to(secret)
    elif target == "relative":
        file.symlink_to(os.path.relpath(secret, file.parent))
    else:
        (folder / "between").symlink_to(secret)
        file.symlink_to(folder / "between")
    with pytest.raises(FormatError, match=f"{name}: is a link to {secret}, outside of its folder"):
        artifact_files(folder)
    if name == "config.json":
        with pytest.raises(FormatError, match="outside of its folder"):
            read_config(folder)


def test_a_folder_of_templates_that_is_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    (folder.parent / "other/a.jinja").touch()
    (folder / "additional_chat_templates").symlink_to(folder.parent / "other")
    with pytest.raises(FormatError, match=r"a\.jinja: is a link to .*other/a\.jinja"):
        artifact_files(folder)


def test_a_link_to_nothing_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("absent")
    with pytest.raises(FormatError, match=r"tokenizer\.json: is a link to a file that is not"):
        artifact_files(folder)


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("config.json")
    (folder.parent / "link").symlink_to(folder)
    assert artifact_files(folder.parent / "link") == {"config.json": b"{}", "tokenizer.json": b"{}"}


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        ("models--a--b/blobs/1", None),
        ("models--a--c/blobs/1", "outside of its folder"),
        ("blobs/1", "outside of its folder"),
    ],
)
def test_links_into_the_blobs_of_the_same_model_in_the_hubs_cache_are_followed(
    tmp_path: Path, blob: str, says: str | None
) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / blob).parent.mkdir(parents=True)
    (tmp_path / blob).write_text("{}")
    (snapshot / "config.json").symlink_to(os.path.relpath(tmp_path / blob, snapshot))
    if says is None:
        assert artifact_files(snapshot) == {"config.json": b"{}"}
        assert read_config(snapshot) == {}
        return
    with pytest.raises(FormatError, match=says):
        artifact_files(snapshot)


def test_shards_may_be_links_to_anywhere(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (sharded / "two.safetensors").rename(tmp_path / "elsewhere/two.safetensors")
    (sharded / "two.safetensors").symlink_to(tmp_path / "elsewhere/two.safetensors")
    assert HFFolder.read(sharded).arrays.keys() == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_pipe_is_refused_and_nobody_waits_for_its_writer(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(FormatError, match=f"{name}"):
        artifact_files(folder) and HFFolder.read(folder)


def test_artifact_files_that_are_too_large_together(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        with (folder / name).open("wb") as file:
            file.truncate(ARTIFACT_FILES_LIMIT // 2 + 1)
    with pytest.raises(FormatError, match="hf: its config and tokenizer files have more than"):
        artifact_files(folder)


def test_thousands_of_shards_use_one_descriptor_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"t": torch.zeros(1)}, tmp_path / "first")
    data = (tmp_path / "first").read_bytes()
    for i in range(300):
        shard = data.replace(b'"t"', b'"%d"' % i)
        length = len(shard) - 12
        (tmp_path / f"{i}.safetensors").write_bytes(length.to_bytes(8, "little") + shard[8:])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard)
    )
    try:
        assert len(HFFolder.read(tmp_path).arrays) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
