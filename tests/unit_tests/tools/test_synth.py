"""Synthesised checkpoints: random, reproducible, and loaded by transformers."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.tools.synth import synth


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        synth("olmo2-tiny", tmp_path / name, layers=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_another_seed_gives_other_weights_everywhere(tmp_path: Path) -> None:
    a, b = (load(synth("olmo2-tiny", tmp_path / str(s), layers=1, seed=s)) for s in (0, 1))
    assert a.keys() == b.keys()
    assert not [name for name in a if torch.equal(a[name], b[name])]


def test_the_weights_do_not_depend_on_the_shard_size(tmp_path: Path) -> None:
    one = synth("olmo2-tiny", tmp_path / "one", layers=2)
    many = synth("olmo2-tiny", tmp_path / "many", layers=2, max_shard_size="100KB")
    assert (one / "model.safetensors").exists()
    assert len(list(many.glob("*.safetensors"))) > 3
    assert (many / "model.safetensors.index.json").exists()
    a, b = load(one), load(many)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_are_normal_and_norm_gains_lie_around_one(tmp_path: Path) -> None:
    for name, tensor in load(synth("olmo2-tiny", tmp_path / "t", dtype="float32")).items():
        if "norm" in name:
            assert 0.5 <= tensor.min() < 0.7 < 1.3 < tensor.max() <= 1.5, name
            assert len(tensor.unique()) > 60, name
        else:
            assert tensor.std() == pytest.approx(0.02, rel=0.05), name
            assert abs(tensor.mean()) < 1e-3, name


def test_tensors_differ_from_each_other(tmp_path: Path) -> None:
    tensors = load(synth("olmo2-tiny", tmp_path / "t", dtype="float32"))
    firsts = [tensor.flatten()[:4] for name, tensor in tensors.items() if "norm" not in name]
    assert len(torch.stack(firsts).unique(dim=0)) == len(firsts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    folder = synth("olmo2-tiny", tmp_path / "t", dtype=dtype, layers=1)
    assert {t.dtype for t in load(folder).values()} == {getattr(torch, dtype)}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = synth("olmo2-tiny", tmp_path / "t", max_shard_size="1MB")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(model).__name__ == "Olmo2ForCausalLM"
    assert not any(info.values()), info
    state, tensors = model.state_dict(), load(folder)
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name].to(state[name].dtype)) for name in state)
    assert model.config.num_key_value_heads == 4
    with torch.no_grad():
        assert model(torch.arange(6)[None]).logits.isfinite().all()


def test_fewer_layers(tmp_path: Path) -> None:
    folder = synth("olmo2-tiny", tmp_path / "t", layers=1)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    assert not [name for name in load(folder) if ".layers.1." in name]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert synth("olmo2-tiny", tmp_path, layers=1) == tmp_path
    assert (tmp_path / "config.json").exists()


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'olmo2-2b' is not known\. Known are: olmo2-tiny, "):
        synth("olmo2-2b", tmp_path / "t")
    with pytest.raises(InputError, match="dtype 'int8' is not one of float32"):
        synth("olmo2-tiny", tmp_path / "t", dtype="int8")
    with pytest.raises(InputError, match="--layers must be a number from 1 to 100,000"):
        synth("olmo2-tiny", tmp_path / "t", layers=0)
    with pytest.raises(InputError, match="is not a size"):
        synth("olmo2-tiny", tmp_path / "t", max_shard_size="big")
    assert not (tmp_path / "t").exists()
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError, match="exists already; name a new folder"):
            synth("olmo2-tiny", taken)
    with pytest.raises(OutputError, match="can't be made"):
        synth("olmo2-tiny", tmp_path / "file/inside")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "disk full")])
def test_a_failed_run_leaves_no_folder(error: BaseException, tmp_path: Path) -> None:
    """Else the half-written folder would be in the way of a second try."""

    class Failing(Reporter):
        def advance(self, done: int) -> None:
            raise error

    with pytest.raises(type(error)):
        synth("olmo2-tiny", tmp_path / "t", layers=1, reporter=Failing())
    assert list(tmp_path.iterdir()) == []
    synth("olmo2-tiny", tmp_path / "t", layers=1)
