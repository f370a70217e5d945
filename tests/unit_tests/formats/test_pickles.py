"""Pickles as data: read without importing what they name, written so that pickle reads them."""

import argparse
import array
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import math
import operator
import os
import pathlib
import pickle
import random
import re
import signal
import sys
import types
import uuid
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_olmo_bridge.errors import UnsafePickleError
from megatron_olmo_bridge.formats.inert import Inert, built, inert
from megatron_olmo_bridge.formats.pickles import Persistent, dumps, loads

PLAIN: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31 - 1,
    2**31,
    -(2**31),
    -(2**31) - 1,
    2**63,
    -(2**63),
    2**200,
    -(2**200),
    0.0,
    -0.0,
    1e-300,
    float("inf"),
    "",
    "text",
    "näme \N{SNOWMAN}",
    "x" * 300,
    (),
    (1, "a", (2.5,)),
    [],
    [[1], [2, 3]],
    {},
    {"a": 1, (1, 2): {"b": [None]}},
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_round_trip(value: Any) -> None:
    for read in (pickle.loads(dumps(value)), loads(dumps(value), "file")):
        assert read == value
        assert repr(read) == repr(value)  # True is not 1, -0.0 is not 0.0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_reads_plain_values_of_any_protocol(value: Any, protocol: int) -> None:
    assert repr(loads(pickle.dumps(value, protocol), "file")) == repr(value)


def test_the_same_value_gives_the_same_bytes() -> None:
    value = {"a": [1, "x"], "n": built("argparse.Namespace", {"k": (1, 2)})}
    assert dumps(value) == dumps({"a": [1, "x"], "n": built("argparse.Namespace", {"k": (1, 2)})})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_of_the_standard_library_are_read_as_themselves(protocol: int) -> None:
    value = {"o": OrderedDict(a=1), "s": {1, 2}, "f": frozenset({3})}
    assert loads(pickle.dumps(value, protocol), "file") == value


def test_a_global_is_written_as_a_global() -> None:
    assert pickle.loads(dumps(inert("torch.Size"))) is torch.Size
    assert pickle.loads(dumps(inert("collections.OrderedDict"))) is OrderedDict


def test_a_placeholder_without_state_is_a_call() -> None:
    assert pickle.loads(dumps(inert("torch.Size")((3, 4)))) == torch.Size([3, 4])
    assert pickle.loads(dumps(inert("pathlib.PurePosixPath")("a", "b"))) == pathlib.PurePosixPath(
        "a/b"
    )


def test_a_placeholder_with_a_state_is_an_object() -> None:
    namespace = pickle.loads(dumps(built("argparse.Namespace", {"layers": 3, "spec": ["a", "b"]})))
    assert namespace == argparse.Namespace(layers=3, spec=["a", "b"])


def real_metadata() -> Metadata:
    properties = TensorProperties(dtype=torch.bfloat16)
    chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3])),
        ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([1, 3])),
    ]
    return Metadata(
        state_dict_metadata={
            "weight": TensorStorageMetadata(properties, torch.Size([3, 3]), chunks),
            "extra": BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex("weight", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 2**40),
            MetadataIndex("extra"): _StorageInfo("__0_0.distcp", 2**40, 7),
        },
    )


def test_torchs_metadata_survives_reading_and_writing() -> None:
    real = real_metadata()
    back = pickle.loads(dumps(loads(pickle.dumps(real), "file")))
    assert back == real
    assert type(back) is Metadata
    assert back.storage_data == real.storage_data


class Mode(enum.Enum):
    """Stands for megatron's enums."""

    FAST = 1


Mode.__module__ = "megatron.core.enums"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoints_settings_are_read_as_placeholders(
    protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("megatron.core.enums")
    module.Mode = Mode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    settings = {
        "mode": Mode.FAST,
        "path": pathlib.PosixPath("/a/b"),
        "signal": signal.SIGTERM,
        "number": np.float32(0.5),
        "array": np.arange(3),
        "date": datetime.date(2026, 1, 2),
        "simple": types.SimpleNamespace(a=1),
        "dtype": torch.bfloat16,
    }
    plain = {"num_layers": 3, "names": {"a", "b"}, "rate": 0.5}
    data = pickle.dumps(argparse.Namespace(**settings, **plain), protocol)
    read = loads(data, "file")
    assert isinstance(read, Inert)
    assert read.global_name == "argparse.Namespace"
    for name in settings:
        value = read.state[name]
        assert isinstance(value, Inert) or issubclass(value, Inert), name
    assert {name: read.state[name] for name in plain} == plain
    assert repr(read).startswith("<argparse.Namespace")


HARMLESS: list[Any] = [
    functools.partial(torch.nn.functional.gelu, approximate="tanh"), torch.nn.functional.silu,
    torch.tanh, torch.nn.init.normal_, torch.nn.SiLU(), torch.optim.AdamW, torch.Generator,
    collections.deque([1], 2), collections.Counter("a"), collections.defaultdict(list, a=[1]),
    collections.ChainMap({"a": 1}), argparse.FileType("r"), decimal.Decimal("1.5"),
    fractions.Fraction(1, 2), uuid.UUID(int=1), re.compile("a"), re.IGNORECASE,
    datetime.UTC, datetime.date.fromtimestamp, math.sqrt, operator.itemgetter(1), int, len,
    ValueError("x"), type(None), np.tanh, np.random.default_rng(0), np.random.RandomState(0),
    array.array("i", [1]), random.Random(1), list[int], slice(1, None), 1j,
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value", HARMLESS, ids=lambda value: str(value).partition(" at 0x")[0][:40]
)
def test_harmless_types_are_read_as_placeholders(value: Any, protocol: int) -> None:
    read = loads(pickle.dumps({"value": value, "beside": 3}, protocol), "file")
    assert read["beside"] == 3
    assert isinstance(read["value"], Inert) or issubclass(read["value"], Inert)


def test_what_a_container_holds_is_kept() -> None:
    read = loads(
        pickle.dumps([collections.defaultdict(list, a=[1]), collections.deque([1, 2])]), ""
    )
    assert read[0].items == {"a": [1]}
    assert read[1].members == [1, 2]


def foreign(text: str) -> bytes:
    """A pickle of protocol 2 that names ``mine.config``'s members."""
    return b"\x80\x02" + text.replace("@", "cmine.config\n").encode("latin1") + b"."


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        ("@Config\n)\x81}X\x01\x00\x00\x00aK\x03sb", "mine.config.Config"),  # an object
        ("@config\n)\x81}X\x01\x00\x00\x00aK\x03sb", "mine.config.config"),  # the same
        ("@Mode\nK\x01\x85R", "mine.config.Mode"),  # an enum's member
        ("@function\n", "mine.config.function"),  # not called
    ],
)
def test_classes_of_other_programs_where_they_may_be(pickled: str, name: str) -> None:
    assert loads(foreign(pickled), "file", any_classes=True).global_name == name
    with pytest.raises(UnsafePickleError, match=f"asks for {name}, which has no place"):
        loads(foreign(pickled), "file")


@pytest.mark.parametrize("pickled", ["@function\n)R", "@function\nK\x01\x85R", "@_make\n)R"])
def test_functions_of_other_programs_are_not_called(pickled: str) -> None:
    with pytest.raises(
        UnsafePickleError, match=r"calls mine\.config\.\w+, which is not known here"
    ):
        loads(foreign(pickled), "file", any_classes=True)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn.modules", "module.torch.load"),
        ("torch.nn.functional", "__builtins__"),
        ("mine.config", "os.system"),
        ("mine.config", "Config.__init__"),
        ("mine.config", "Config.__init__.__globals__"),
        ("os", "PathLike"),
        ("numpy.testing", "Tester"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(module: str, name: str) -> None:
    parts = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)]
    with pytest.raises(UnsafePickleError, match=f"asks for {module}.{name},"):
        loads(b"\x80\x04" + b"".join(parts) + b"\x93.", "file", any_classes=True)


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        ("torch.nn.functional\ntorch", "load"),
        ("torch\nTensor", "__reduce__"),
        ("torch\nTensor", "a.b"),
    ],
)
def test_attributes_of_what_is_no_class_are_refused(owner: str, attribute: str) -> None:
    data = f"\x80\x02cbuiltins\ngetattr\nc{owner}\nX{chr(len(attribute))}\0\0\0{attribute}\x86R."
    with pytest.raises(UnsafePickleError, match=r"asks for builtins\.getattr,"):
        loads(data.encode("latin1"), "file")


class Evil:
    """Runs something when it is unpickled."""

    def __init__(self, call: Any, *args: Any) -> None:
        self._reduced = call, args

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize(
    ("call", "args", "name"),
    [
        (eval, ("ran.append(1)",), "builtins.eval"),
        (exec, ("ran.append(1)",), "builtins.exec"),
        (__import__, ("this",), "builtins.__import__"),
        (getattr, ("x", "upper"), "builtins.getattr"),
        (os.system, ("true",), "posix.system"),
        (torch.load, ("x",), "torch.serialization.load"),
        (torch.hub.load, ("x", "y"), "torch.hub.load"),
    ],
)
def test_any_other_global_is_refused_by_name(call: Any, args: tuple[Any, ...], name: str) -> None:
    for protocol in (2, 4):
        with pytest.raises(UnsafePickleError) as caught:
            loads(pickle.dumps({"a": [Evil(call, *args)]}, protocol), "some/.metadata")
        assert str(caught.value).startswith(f"some/.metadata: the pickle asks for {name}")


def test_allowed_globals_are_never_called() -> None:
    read = loads(pickle.dumps(pathlib.PosixPath("/a")), "file")
    assert type(read) is not pathlib.PosixPath
    assert isinstance(read, Inert)


def test_allowed_modules_are_not_imported() -> None:
    data = b"\x80\x02cmegatron.core.no_such_module\nNoSuchClass\n)R."
    assert loads(data, "file").global_name == "megatron.core.no_such_module.NoSuchClass"


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"no pickle", b"\x80\x02]q", b"\x80\x7fN."])
def test_what_is_no_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(UnsafePickleError, match="file: not a readable pickle"):
        loads(data, "file")


def test_persistent_ids_are_handed_over() -> None:
    data = dumps([Persistent(("storage", 7)), "x"])
    assert loads(data, "file", lambda pid: {"id": pid}) == [{"id": ("storage", 7)}, "x"]

    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return f"storage {pid[1]}"

    assert Reader(io.BytesIO(data)).load() == ["storage 7", "x"]


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), [pathlib.Path()]])
def test_what_has_no_way_to_be_written_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot pickle a"):
        dumps(value)
