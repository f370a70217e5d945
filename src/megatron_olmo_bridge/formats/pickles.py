"""Pickles read and written without running or importing anything that they name.

A pickle is a program. Reading one here maps every global name on an allow-list to an inert
placeholder that only remembers what it was given, and refuses every other name; writing emits the
opcodes of protocol 2 from the same placeholders. So neither torch nor megatron need be installed
to read or write a checkpoint's metadata, and the same input gives the same bytes.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

from megatron_olmo_bridge.errors import UnsafePickleError

# Names seen in real checkpoints. They become placeholders, so nothing of them can run; the list is
# narrow all the same, because a name that has no place in a checkpoint is a reason to stop.
_ALLOWED = re.compile(
    r"torch\.(Size|device|strided|contiguous_format|\w+Storage|b?float\d+(_\w+)?|u?int\d+|bool|long"
    r"|half|float|double|complex\d+)"
    r"|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_\w+"
    r"|torch\.serialization\._get_layout"
    r"|torch\.distributed\.checkpoint\.\w+(\.\w+)*"
    r"|torch\.distributed\.(_shard|tensor|_tensor)(\.\w+)+"
    r"|(megatron|transformer_engine|nemo)\.\w+(\.\w+)*"
    r"|numpy\.(dtype|ndarray|\w+\d+|bool_?)"
    r"|numpy\._?core\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)"
    r"|numpy\.dtypes\.\w+"
    r"|pathlib\.(\w+\.)?(Pure)?(Posix|Windows)?Path"
    r"|argparse\.Namespace|types\.SimpleNamespace|signal\.Signals|_codecs\.encode"
    r"|datetime\.(date|datetime|time|timedelta)|copyreg\._reconstructor|builtins\.(object|range)"
)
_PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": bytearray,
    "builtins.slice": slice,
    "builtins.complex": complex,
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules by the names that protocol 2, which torch.save uses, gives them."""


class Inert:
    """Stands for an object of a class that was never imported."""

    global_name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.state = args, kwargs or None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.global_name} {self.args} {self.state}>"


def inert(name: str) -> type[Inert]:
    """The placeholder class for a global, ``inert("torch.Size")``."""
    return type(name.rpartition(".")[2], (Inert,), {"global_name": name})


def built(name: str, state: Any) -> Inert:
    """A placeholder object whose attributes are ``state``."""
    placeholder = inert(name)()
    placeholder.state = state
    return placeholder


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, where: object, storage: Callable[[tuple[Any, ...]], Any]):
        super().__init__(io.BytesIO(data))
        self._where, self._storage = where, storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if _ALLOWED.fullmatch(full):
            return inert(full)
        raise UnsafePickleError(
            f"{self._where}: the pickle asks for {full}, which has no place in a checkpoint. "
            "Nothing of it was run. Don't load this file with other tools either."
        )

    def persistent_load(self, pid: Any) -> Any:
        return self._storage(pid)


def loads(data: bytes, where: object, storage: Callable[[tuple[Any, ...]], Any] = tuple) -> Any:
    """Read a pickle into plain values and :class:`Inert` placeholders.

    Args:
        data: the pickle.
        where: the file, for messages.
        storage: called with each persistent id (torch's storages).

    Raises:
        UnsafePickleError: it names a global that is not on the allow-list, or is no pickle.
    """
    try:
        return _Reader(data, where, storage).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UnsafePickleError(f"{where}: not a readable pickle ({error})") from error


class Persistent(tuple[Any, ...]):
    """A persistent id: torch's way to refer to a storage."""


def dumps(value: Any) -> bytes:
    """Pickle plain values, placeholders and :class:`Persistent` ids, protocol 2, no memo.

    An :class:`Inert` class becomes a global, an instance with a state ``cls.__new__`` plus state,
    and an instance without a call of the global with its arguments.
    """
    out = bytearray(b"\x80\x02")
    _write(value, out)
    return bytes(out + b".")


def _write(value: Any, out: bytearray) -> None:
    match value:
        case None:
            out += b"N"
        case bool():
            out += b"\x88" if value else b"\x89"
        case int():
            if -(2**31) <= value < 2**31:
                out += b"J" + struct.pack("<i", value)
            else:
                data = pickle.encode_long(value)
                out += b"\x8a" + bytes([len(data)]) + data
        case float():
            out += b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            out += b"X" + struct.pack("<I", len(data)) + data
        case Persistent():
            _write(tuple(value), out)
            out += b"Q"
        case tuple():
            out += b"("
            for item in value:
                _write(item, out)
            out += b"t"
        case list():
            out += b"]("
            for item in value:
                _write(item, out)
            out += b"e"
        case dict():
            out += b"}("
            for key, item in value.items():
                _write(key, out)
                _write(item, out)
            out += b"u"
        case type() if issubclass(value, Inert):
            module, _, name = value.global_name.rpartition(".")
            out += f"c{module}\n{name}\n".encode()
        case Inert():
            _write(type(value), out)
            _write(value.args, out)
            if value.state is None:
                out += b"R"
            else:
                out += b"\x81"
                _write(value.state, out)
                out += b"b"
        case _:
            raise TypeError(f"cannot pickle a {type(value).__name__}")
