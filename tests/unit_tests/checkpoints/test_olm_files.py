"""Files of OLM's trainer: which are taken for such, and where in them the tensors are."""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.checkpoints.olm import OLMCheckpoint, read_olm
from megatron_olmo_bridge.checkpoints.open import find_kind
from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, UnsafePickleError
from megatron_olmo_bridge.formats.inert import built, inert
from megatron_olmo_bridge.formats.pickles import Persistent, dumps
from megatron_olmo_bridge.formats.tensors import StoredArray

STATE = {"a.weight": torch.randn(3, 5), "a.bias": torch.randn(3).bfloat16()}


def saved(tmp_path: Path, model: Any, key: str = "model_state_dict", **options: Any) -> Path:
    """A checkpoint as OLM's callback writes it, with this model."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    file = tmp_path / "step_3.pt"
    value = {
        "step": 3,
        "epoch": 0,
        key: model,
        "optimizer_state_dict": optimizer.state_dict(),
        "scaler_state_dict": {},
        "losses": [1.0, 0.5],
    }
    torch.save(value, file, **options)
    return file


def values(array: StoredArray) -> torch.Tensor:
    data = array.file.read_bytes()[array.offset : array.offset + array.nbytes]
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, array.dtype)).view(array.shape)


def assert_found(arrays: dict[str, StoredArray], state: dict[str, torch.Tensor]) -> None:
    assert list(arrays) == list(state)
    for name, tensor in state.items():
        assert values(arrays[name]).dtype == tensor.dtype
        assert torch.equal(values(arrays[name]), tensor)


@pytest.mark.parametrize("key", ["model_state_dict", "model"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_every_tensor_of_the_model_is_read(tmp_path: Path, key: str, kind: Any) -> None:
    assert_found(read_olm(saved(tmp_path, kind(STATE), key)), STATE)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_are_those_of_the_model_that_was_wrapped(tmp_path: Path, wrapper: str) -> None:
    wrapped = {f"{wrapper}{name}": tensor for name, tensor in STATE.items()}
    assert_found(read_olm(saved(tmp_path, wrapped)), STATE)


def test_a_prefix_of_some_names_only_is_kept(tmp_path: Path) -> None:
    state = {"module.x": torch.zeros(2), "y": torch.ones(2)}
    assert_found(read_olm(saved(tmp_path, state)), state)


def test_shared_tensors_are_the_same_array(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    arrays = read_olm(saved(tmp_path, {"a": shared, "b": shared, "c": shared.clone()}))
    assert arrays["a"] == arrays["b"] != arrays["c"]


@pytest.mark.parametrize("name", ["step_3.pt", "best_model.pt"])
def test_a_pt_file_is_read_as_an_olm_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    assert find_kind(tmp_path / name) == (OLMCheckpoint, tmp_path / name)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"step": 3}, "it has no model_state_dict or model with tensors by name"),
        (torch.zeros(3), "not a checkpoint of OLM's trainer"),
        ([1], "not a checkpoint of OLM's trainer"),
        ({"model": [torch.zeros(3)]}, "not a checkpoint of OLM's trainer"),
        ({"model": {3: torch.zeros(3)}}, "not a checkpoint of OLM's trainer"),
    ],
)
def test_other_files_of_torch_save_are_refused(tmp_path: Path, value: Any, says: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(InputError, match=says):
        read_olm(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.randn(4, 3).t(), "not contiguous"),
        (torch.randn(4, 6)[:, :3], "not contiguous"),
        (torch.zeros(3, dtype=torch.bool), "BoolStorage are not converted"),
        (torch.zeros(3, dtype=torch.float64), "DoubleStorage are not converted"),
        (7, "holds 7, not a plain tensor"),
        ({"x": torch.zeros(3)}, "not a plain tensor"),
    ],
)
def test_tensors_that_cannot_be_converted_are_named(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(FormatError, match=rf"step_3\.pt: h\.mask: .*{says}"):
        read_olm(saved(tmp_path, {"a": torch.zeros(2), "h.mask": value}))


def rezipped(
    file: Path, pickled: bytes | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """The file with another pickle, or compressed."""
    other = file.with_name("other.pt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w", compression) as new:
        for name in old.namelist():
            is_pickle = name.endswith("/data.pkl") and pickled is not None
            new.writestr(name, pickled if is_pickle else old.read(name))
    return other


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the archive is compressed"):
        read_olm(rezipped(saved(tmp_path, STATE), compression=zipfile.ZIP_DEFLATED))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    file = saved(tmp_path, STATE)
    data = file.read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"not an archive of torch\.save"):
            read_olm(file)


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    for data in (b"", b"PK\x03\x04", os.urandom(500)):
        file.write_bytes(data)
        with pytest.raises(FormatError, match=r"not an archive of torch\.save"):
            read_olm(file)
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"not an archive of torch\.save"):
        read_olm(file)


class Calls:
    """Pickles as a call of a function."""

    def __reduce__(self) -> Any:
        return os.system, ("touch the-pickle-was-run",)


@pytest.mark.parametrize("key", ["model_state_dict", "scheduler_state_dict"])
def test_code_is_refused_by_name_and_nothing_runs(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": STATE, key: {"a": Calls()}}, tmp_path / "x.pt")
    with pytest.raises(UnsafePickleError, match=r"asks for posix\.system"):
        read_olm(tmp_path / "x.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["x.pt"]


REBUILD, FLOAT = inert("torch._utils._rebuild_tensor_v2"), inert("torch.FloatStorage")
STORAGE = Persistent(("storage", FLOAT, "0", "cpu", 15))
"""Storage of ``a.weight``."""


@pytest.mark.parametrize(
    "tensor",
    [
        REBUILD,
        REBUILD(),
        REBUILD(STORAGE),
        REBUILD("storage", 0, (3, 5), (5, 1)),
        REBUILD(STORAGE, None, (3, 5), (5, 1)),
        REBUILD(STORAGE, -1, (3, 5), (5, 1)),
        REBUILD(STORAGE, 1, (3, 5), (5, 1)),
        REBUILD(STORAGE, 0, (-3, 5), (5, 1)),
        REBUILD(STORAGE, 0, (-3, -5), (-5, 1)),
        REBUILD(STORAGE, 0, (3.0, 5), (5, 1)),
        REBUILD(STORAGE, 0, (True, 5), (5, 1)),
        REBUILD(STORAGE, 0, (3, 5), (1,)),
        REBUILD(STORAGE, 0, (4, 5), (5, 1)),
        REBUILD(STORAGE, 0, 15, 1),
        REBUILD(STORAGE, 0, inert("torch.Size")(), (5, 1)),
        REBUILD(STORAGE, 0, inert("torch.Size"), (5, 1)),
        inert("torch._utils._rebuild_parameter")(),
        inert("torch._utils._rebuild_parameter"),
        REBUILD(Persistent(("storage", FLOAT, "9", "cpu", 15)), 0, (3,), (1,)),
        REBUILD(Persistent(("storage", FLOAT, "0", "cpu", 9)), 0, (3,), (1,)),
        REBUILD(Persistent(("storage", "torch.FloatStorage", "0", "cpu", 15)), 0, (3,), (1,)),
        REBUILD(Persistent(("storage",)), 0, (3,), (1,)),
    ],
)  # fmt: skip
def test_invalid_tensors_are_refused(tmp_path: Path, tensor: Any) -> None:
    file = rezipped(saved(tmp_path, STATE), dumps({"model": {"a.weight": tensor}}))
    with pytest.raises(FormatError, match=r"other\.pt"):
        read_olm(file)


class Hiding:
    """Pickles as a dictionary whose attributes hide its methods."""

    def __reduce__(self) -> Any:
        attributes = dict.fromkeys(("items", "keys", "get", "values"), "no function")
        return OrderedDict, (), attributes, None, iter(STATE.items())


def test_a_pickle_that_hides_methods_of_a_dictionary_does_no_harm(tmp_path: Path) -> None:
    assert_found(read_olm(saved(tmp_path, Hiding())), STATE)


@pytest.mark.parametrize("model", [built("torch.Size", {"a": 1}), None, "text", ()])
def test_a_model_that_is_not_a_dictionary_is_refused(tmp_path: Path, model: Any) -> None:
    file = rezipped(saved(tmp_path, STATE), dumps({"model": model}))
    with pytest.raises(BridgeError, match="not a checkpoint of OLM's trainer"):
        read_olm(file)
