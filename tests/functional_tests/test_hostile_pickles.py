"""No code of a hostile pickle runs; a benign pickle is read, whatever classes it names."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from damage import ITERATION, calling, edit_stored, rename_key, write_archive

from megatron_olmo_bridge import export_checkpoint, inspect, verify
from megatron_olmo_bridge.errors import BridgeError, UnsafePickleError
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder

SENTINEL = "the-pickle-was-run"
TOUCH = f"open('{SENTINEL}', 'w').close()"
NORM = "decoder.final_layernorm.weight"
STATE, COMMON_STATE = "decoder.final_layernorm._extra_state/shard_0_1", "common_state/shard_0_1"


class Calls:
    """Object that pickles as a function call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def deep_inside(value: object) -> bytes:
    """Return a nested state like a checkpoint's that contains the value."""
    return pickle.dumps({"args": argparse.Namespace(x=[{1: (value,)}]), "iteration": 0})


HOSTILE = {
    "os.system": calling("os.system", f"touch {SENTINEL}"),
    "posix.system": pickle.dumps(Calls(os.system, f"touch {SENTINEL}")),
    "posix.unlink": deep_inside(Calls(os.unlink, "/none")),
    "subprocess.Popen": calling("subprocess.Popen", f"touch {SENTINEL}"),
    "builtins.eval": pickle.dumps(Calls(eval, TOUCH)),
    "builtins.exec": deep_inside(Calls(exec, TOUCH)),
    "builtins.compile": calling("__builtin__.compile", TOUCH),  # Python 2's name
    "builtins.getattr": calling("builtins.getattr", "os", "system"),
    "builtins.open": calling("builtins.open", SENTINEL, "w"),
    "builtins.__import__": calling("builtins.__import__", "os"),
    "importlib.import_module": calling("importlib.import_module", "antigravity"),
    "pickle.loads": calling("pickle.loads", "x"),
    "runpy.run_path": calling("runpy.run_path", "x.py"),
    "operator.attrgetter": calling("operator.attrgetter", "system"),
    "operator.methodcaller": calling("operator.methodcaller", "system", "true"),
    "builtins.map": calling("__builtin__.map", "f", "x"),
    "types.FunctionType": calling("types.FunctionType", "code"),
    "marshal.loads": calling("marshal.loads", "x"),
    "ctypes.CDLL": calling("ctypes.CDLL", "libc.so.6"),
    "shutil.rmtree": calling("shutil.rmtree", "/none"),
    "torch.storage._load_from_bytes": calling("torch.storage._load_from_bytes", "x"),
    "torch.package.PackageImporter": calling("torch.package.PackageImporter", "x"),
    "torch.hub.load": calling("torch.hub.load", "someone/repository", "model"),
    "torch.load": calling("torch.load", "x.pt"),
    "torch.jit.load": calling("torch.jit.load", "x.pt"),
    "torch.utils.cpp_extension.load": calling("torch.utils.cpp_extension.load", "x"),
    "numpy.load": calling("numpy.load", "x.npy"),
    "numpy.testing._private.utils.runstring": calling(
        "numpy.testing._private.utils.runstring", TOUCH
    ),
    # Since protocol 4 a name may be a path of attributes.
    "argparse.Namespace.__class__": b"\x80\x04\x8c\x08argparse\x8c\x13Namespace.__class__\x93.",
    # Imported modules are attributes of a module.
    "torch.optim.adam.torch.load": b"\x80\x04\x8c\x0btorch.optim\x8c\x0fadam.torch.load\x93.",
    "megatron.core.os.system": b"\x80\x04\x8c\x0dmegatron.core\x8c\x09os.system\x93.",
    "mine.config.os.system": b"\x80\x04\x8c\x0bmine.config\x8c\x09os.system\x93.",
}
"""Hostile pickles by the global that they reference."""


# An allow-listed name is never imported, so calling it has no effect.
HARMLESS = {
    "functools.partial": calling("functools.partial", "x"),
    "collections.defaultdict": calling("collections.defaultdict", "x"),
    "megatron.nothing.here": calling("megatron.nothing.here", "x"),
    "torch.distributed.checkpoint.anything": calling("torch.distributed.checkpoint.anything", "x"),
}


def into_metadata(folder: Path, pickled: bytes) -> None:
    (folder / ".metadata").write_bytes(pickled)


def into_common(folder: Path, pickled: bytes) -> None:
    write_archive(folder / "common.pt", pickled)


def among_shards(folder: Path, key: str, pickled: bytes) -> None:
    """Replace a tensor's or an object's archive by a separate file."""
    file = folder / "__1_0.distcp"
    write_archive(file, pickled)
    at = {"relative_path": file.name, "offset": 0, "length": file.stat().st_size}
    edit_stored(folder.parent, key, lambda stored: stored.update(at))


def into_common_object(folder: Path, pickled: bytes) -> None:
    """Write into the object in which megatron-core 0.19 keeps the common state."""
    (folder / "common.pt").unlink()
    rename_key(folder.parent, STATE, COMMON_STATE)
    among_shards(folder, COMMON_STATE, pickled)


def into_tensor(folder: Path, pickled: bytes) -> None:
    among_shards(folder, NORM, pickled)


PLACES = {
    ".metadata": into_metadata,
    "common.pt": into_common,
    COMMON_STATE: into_common_object,
    "a tensor": into_tensor,
}


@pytest.fixture
def copy(megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of a checkpoint to damage; a pickle that runs would leave a file in the working
    directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(megatron, tmp_path / "megatron"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_code_of_a_hostile_pickle_runs(
    copy: Path, tmp_path: Path, megatron: Path, name: str, place: str
) -> None:
    PLACES[place](copy / ITERATION, HOSTILE[name])
    commands: list[Callable[[], object]] = [
        lambda: inspect(copy),
        lambda: export_checkpoint(copy, tmp_path / "hf"),
        lambda: verify(copy, megatron),
        lambda: verify(megatron, copy),
    ]

    for command in commands:
        with pytest.raises(UnsafePickleError) as refused:
            command()

        assert f"asks for {name}," in str(refused.value)
        assert "Nothing of it was run" in str(refused.value)

    assert [p.name for p in tmp_path.iterdir()] == ["megatron"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", HARMLESS)
def test_allowed_names_are_never_called(copy: Path, name: str, place: str) -> None:
    PLACES[place](copy / ITERATION, HARMLESS[name])

    with pytest.raises(BridgeError):  # not metadata, state or a tensor
        inspect(copy)


def test_a_pickle_cannot_fill_the_memory(copy: Path) -> None:
    """``set(range(...))`` needs only builtins and would never finish."""
    bomb = b"\x80\x02cbuiltins\nset\ncbuiltins\nrange\nL999999999999999999L\n\x85R\x85R."
    into_common(copy / ITERATION, bomb)

    with pytest.raises(UnsafePickleError, match=r"common\.pt"):
        inspect(copy)


# --------------------------------------------------------------------------- honest ones are read


class Schedule:
    """Class of the training program, unknown to the program that reads its checkpoint."""

    def __init__(self) -> None:
        self.steps = [1, 2]


class Phase(enum.Enum):
    """Enum of the training program."""

    WARM_UP = "warm-up"


class Options(dict[str, Any]):
    """Dictionary of the training program."""


def its_function() -> None:
    raise AssertionError("it was called")


OTHER_TYPES = {
    "activation": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "another_activation": torch.tanh,
    "silu": torch.nn.functional.silu,
    "module": torch.nn.SiLU(),
    "init_method": functools.partial(torch.nn.init.normal_, std=0.02),
    "by_name": collections.defaultdict(list, {"a": [1]}),
    "last": collections.deque([1, 2], maxlen=2),
    "ordered": collections.OrderedDict(a=1),
    "counted": collections.Counter("aab"),
    "file": argparse.FileType("r"),
    "kind": int,
    "price": decimal.Decimal("0.5"),
    "started": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "pattern": re.compile("a+"),
    "array": np.float32(0.5) + np.arange(2),
    "flag": np.bool_(True),
    "seeds": np.random.default_rng(0),
    "schedule": Schedule(),
    "phase": Phase.WARM_UP,
    "options": Options(a=1),
    "callback": its_function,
    "reduction": torch.distributed.ReduceOp.SUM,
}


def real_args() -> argparse.Namespace:
    """Return ``args`` as a training run saves them, with real objects of the classes that occur."""
    enums = pytest.importorskip("megatron.core.transformer.enums")
    return argparse.Namespace(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=8,
        group_query_attention=True,
        num_query_groups=4,
        kv_channels=16,
        max_position_embeddings=4096,
        norm_epsilon=1e-6,
        rotary_base=500000,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
        padded_vocab_size=1024,
        vocab_size=1024,
        bf16=True,
        fp16=False,
        **OTHER_TYPES,
        attention_backend=enums.AttnBackend.auto,
        attn_mask_type=enums.AttnMaskType.causal,
        model_type=pytest.importorskip("megatron.core.enums").ModelType.encoder_or_decoder,
        params_dtype=torch.bfloat16,
        main_grads_dtype=torch.float32,
        load=PosixPath("/checkpoints/run"),
        exit_signal=signal.SIGTERM,
        lr=np.float64(3e-4),
        consumed_samples=np.int64(12),
        loss_scales=np.arange(3, dtype=np.float32),
        sizes=torch.Size([1, 2]),
        data_path=["a", PosixPath("b")],
        known=frozenset({"x"}),
        blend=(None, {"k": slice(1, 2)}),
        a_tensor=torch.arange(4.0),
    )


def test_the_args_of_a_real_run_are_read(copy: Path, tmp_path: Path, sharded: Path) -> None:
    """torch itself saves them, and only they describe the model."""
    state = {"args": real_args(), "iteration": 0, "checkpoint_version": 3.0}
    torch.save(state, copy / ITERATION / "common.pt")
    (copy / ITERATION / "hf" / "config.json").unlink()
    (copy / ITERATION / "run_config.yaml").unlink()

    found = inspect(copy)

    assert found.size == "olmo2-tiny"
    assert found.config_from.endswith("common.pt")
    export_checkpoint(copy, tmp_path / "hf")
    differences = verify(sharded, tmp_path / "hf").differences
    assert [d.name for d in differences if d.kind != "config"] == []


@pytest.mark.parametrize("kind", [Options, Schedule, dict])
def test_args_may_contain_objects_of_any_class(copy: Path, kind: Any) -> None:
    """The class may be a dictionary or any object of the training program."""
    args = kind()
    if isinstance(args, dict):
        args.update(vars(real_args()))
    else:
        vars(args).update(vars(real_args()))
    torch.save({"args": args, "iteration": 0}, copy / ITERATION / "common.pt")
    (copy / ITERATION / "hf" / "config.json").unlink()
    (copy / ITERATION / "run_config.yaml").unlink()

    assert inspect(copy).size == "olmo2-tiny"


def test_an_unknown_function_is_not_taken_for_a_class(copy: Path) -> None:
    into_common(copy / ITERATION, calling("mine.config.make_args", "x"))

    with pytest.raises(UnsafePickleError) as refused:
        inspect(copy)

    assert "the pickle calls mine.config.make_args, which is not known here." in str(refused.value)
    assert "Nothing of it was run. If the file is your own, load it with the" in str(refused.value)


@pytest.mark.parametrize("place", [".metadata", "a tensor"])
def test_unknown_classes_are_allowed_only_in_the_common_state(copy: Path, place: str) -> None:
    PLACES[place](copy / ITERATION, calling("mine.config.Config", "x"))

    with pytest.raises(
        UnsafePickleError, match=r"asks for mine\.config\.Config, which has no place"
    ):
        inspect(copy)


def test_the_common_state_of_a_newer_megatron_is_read(copy: Path) -> None:
    """megatron-core 0.19 keeps the common state in an object: a list that holds the dictionary."""
    folder = copy / ITERATION
    into_common_object(folder, b"N.")
    torch.save([{"args": real_args(), "iteration": 0}], folder / "__1_0.distcp")
    length = (folder / "__1_0.distcp").stat().st_size
    edit_stored(copy, COMMON_STATE, lambda stored: stored.update(length=length))

    args = TorchDistFolder.read(folder).args

    assert args is not None
    assert args["num_layers"] == 4
    assert args["untie_embeddings_and_output_weights"] is True


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_is_read_as_torch_itself_pickles_it(copy: Path, protocol: int) -> None:
    file = copy / ITERATION / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # written by this package, so safe to load
    before = TorchDistFolder.read(file.parent)

    file.write_bytes(pickle.dumps(metadata, protocol=protocol))

    assert type(metadata).__module__ == "torch.distributed.checkpoint.metadata"
    assert TorchDistFolder.read(file.parent) == before
