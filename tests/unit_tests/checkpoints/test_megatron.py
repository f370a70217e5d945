"""Opening a checkpoint that claims to be huge, or links to files that are not its own."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, MappingError
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.storage.hub import hub_repository
from megatron_olmo_bridge.tools.model_card import write_model_card
from megatron_olmo_bridge.tools.synth import synth

TINY = [name for name in published_sizes() if name.endswith("-tiny")]


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(request.param, tmp_path_factory.mktemp("tiny") / "hf")


NOT_A_SIZE = ("token_id", "rope_theta", "max_position_embeddings", "n_ctx", "sliding_window")
"""Whole numbers that no tensor's shape shows."""


@pytest.mark.parametrize("size", [10**9, 2**31 - 8, 10**15])
def test_a_size_that_the_tensors_do_not_have(tiny: Path, tmp_path: Path, size: int) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    sizes = [k for k, v in config.items() if type(v) is int and not k.endswith(NOT_A_SIZE)]
    assert len(sizes) >= 4
    for key in sizes:
        (folder / "config.json").write_text(json.dumps(config | {key: size}))
        with pytest.raises(
            BridgeError, match=r"must be|config asks|missing|sent to|divided evenly"
        ) as caught:
            open_checkpoint(folder)
        assert len(str(caught.value)) < 2000


def test_as_many_layers_as_are_read(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "hf"))
    key = "n_layer" if '"n_layer"' in (folder / "config.json").read_text() else "num_hidden_layers"
    changed(folder, **{key: 100_000, "layer_types": None})
    with pytest.raises(MappingError, match="tensors, too few for a model of 100,000 layers"):
        open_checkpoint(folder)


def test_experts_too(tmp_path: Path) -> None:
    folder = synth("olmoe-tiny", tmp_path / "hf")
    changed(folder, num_experts=4096, num_hidden_layers=2)
    with pytest.raises(MappingError, match="too few for a model of 2 layers and 4,096 experts"):
        open_checkpoint(folder)


@pytest.mark.parametrize("labels", [10**7, 10**12])
def test_labels_too(tmp_path: Path, labels: int) -> None:
    folder = synth("olmo2-tiny", tmp_path / "hf")
    changed(folder, architectures=["Olmo2ForSequenceClassification"], num_labels=labels)
    with pytest.raises(BridgeError, match=r"missing|num_labels must be"):
        open_checkpoint(folder)


@pytest.mark.parametrize("record", ["hf/config.json", "run_config.yaml"])
def test_a_megatron_checkpoint_too(tiny_megatron: Path, tmp_path: Path, record: str) -> None:
    root = Path(shutil.copytree(tiny_megatron, tmp_path / "m"))
    folder = root / "iter_0000000"
    if record == "run_config.yaml":
        shutil.rmtree(folder / "hf")
        values = yaml.safe_load((folder / record).read_text())
        values["model"]["num_layers"] = 100_000
        (folder / record).write_text(yaml.safe_dump(values))
    else:
        (folder / "run_config.yaml").unlink()
        changed(folder / "hf", num_hidden_layers=100_000)
    with pytest.raises(BridgeError, match=r"100,000 layers|num_layers is"):
        open_checkpoint(root)


def test_a_folder_of_the_config_that_is_a_link_out_of_the_checkpoint(
    tiny_hf: Path, tmp_path: Path
) -> None:
    import_checkpoint(tiny_hf, tmp_path / "m")
    folder = tmp_path / "m/iter_0000000"
    (folder / "hf").rename(tmp_path / "hf")
    (folder / "hf").symlink_to(tmp_path / "hf")
    with pytest.raises(FormatError, match=r"hf: is a link to .*, outside of its folder"):
        open_checkpoint(tmp_path / "m")
    open_checkpoint(tmp_path / "m", ReadOptions(hf_config=tmp_path / "hf"))  # named by the user


@pytest.mark.parametrize("name", ["hf/config.json", "run_config.yaml", "common.pt"])
def test_a_pipe_is_not_taken_for_an_absent_file(
    tiny_megatron: Path, tmp_path: Path, name: str
) -> None:
    root = Path(shutil.copytree(tiny_megatron, tmp_path / "m"))
    (root / "iter_0000000" / name).unlink()
    os.mkfifo(root / "iter_0000000" / name)
    with pytest.raises(FormatError, match=f"{name}: is a named pipe, not a regular file"):
        open_checkpoint(root)


def test_records_that_name_each_other_as_their_source(tmp_path: Path) -> None:
    folder = synth("olmo2-tiny", tmp_path / "hf")
    record = {"source": str(folder), "files": {}}
    (folder / "olmo_bridge.json").write_text(json.dumps(record))
    assert write_model_card(folder)
    assert (folder / "README.md").read_text().count("made from `hf`") == 8


def test_layers_to_synthesise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--layers must be a number from 1 to 100,000"):
        synth("olmo3-tiny", tmp_path / "hf", layers=10**8)


def test_the_repository_of_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a revision; not of what is a path here."""
    monkeypatch.chdir(tmp_path)
    repository = "allenai/OLMo-2-0425-1B"
    assert hub_repository(repository) == repository
    assert hub_repository(f"{repository}@stage1-step10000-tokens21B") == repository
    assert hub_repository(f"{tmp_path}") is None
    assert hub_repository("./here") is None
    (tmp_path / repository).mkdir(parents=True)
    assert hub_repository(repository) is None
