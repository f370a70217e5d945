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
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from megatron_olmo_bridge.errors import UnsafePickleError

# Names of the standard library, torch and numpy that occur in real checkpoints. They become
# placeholders, so nothing of them can run; the list is narrow all the same, because a name of
# these that has no place in a checkpoint is a sign that the file is hostile.
_ALLOWED = re.compile(
    r"torch\.(Size|device|dtype|layout|memory_format|strided|contiguous_format|Tensor|Generator"
    r"|\w+Storage|b?float\d+(_\w+)?|u?int\d+|bool|long|half|float|double|complex\d+|finfo|iinfo)"
    r"|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_\w+"
    r"|torch\.serialization\._get_layout"
    r"|torch\.(nn\.(functional|init|modules|parameter)|functional|optim|_C\._nn)(\.\w+)+"
    r"|torch\._C\.(_VariableFunctions(Class)?|Generator|_distributed_c10d(\.[A-Z]\w*)+)"
    r"|torch\.distributed\.checkpoint\.\w+(\.\w+)*"
    r"|torch\.distributed\.(_shard|tensor|_tensor)(\.\w+)+"
    r"|torch\.distributed(\.\w+)*(\.[A-Z]\w*)+"
    r"|(megatron|transformer_engine|nemo)\.\w+(\.\w+)*"
    r"|numpy\.(dtype|ndarray|\w+\d+|bool_?)"
    r"|numpy\._?core\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)"
    r"|numpy\.dtypes\.\w+|numpy\.(exp|log|sqrt|tanh|mean|sum|abs|absolute|add|maximum|minimum)"
    r"|numpy\.random(\.\w+)?\.(__\w+_ctor|__pyx_unpickle_SeedSequence|[A-Z]\w*)"
    r"|pathlib\.(\w+\.)?(Pure)?(Posix|Windows)?Path"
    r"|argparse\._?[A-Z]\w*|types\.(SimpleNamespace|MappingProxyType|NoneType|GenericAlias)"
    r"|signal\.Signals"
    r"|collections\.(defaultdict|deque|Counter|ChainMap|User(Dict|List|String))"
    r"|functools\.partial(method)?|enum\.[A-Z]\w*|dataclasses\._?[A-Z]\w*|typing\._?[A-Z]\w*"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|zoneinfo\.ZoneInfo|time\.struct_time"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.(Safe)?UUID|ipaddress\.IPv\w+|random\.Random"
    r"|array\.(array|_array_reconstructor)|re\.(_compile|RegexFlag)|math\.\w+"
    r"|_?operator\.(add|sub|mul|truediv|floordiv|mod|eq|ne|lt|le|gt|ge|neg|getitem|itemgetter)"
    r"|logging\.(getLogger|Logger)|_codecs\.encode|copyreg\._reconstructor"
    r"|builtins\.(object|range|xrange|type|int|long|float|bool|str|unicode|bytes|list|tuple|dict"
    r"|len|min|max|sum|abs|round|sorted|Ellipsis|NotImplemented|\w+(Error|Exception|Warning))"
)
_KNOWN_MODULES = sys.stdlib_module_names | {"torch", "numpy"}
"""Of these the list has what is harmless."""
_CLASS = re.compile(r"_?[A-Z]\w*")
_BUILTIN_CLASSES = {"builtins.dict", "builtins.float", "datetime.date", "datetime.datetime"}
_SPECIAL = re.compile(r"__\w+__")
_PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": bytearray,
    "builtins.slice": slice,
    "builtins.complex": complex,
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
"""Modules by the names that protocol 2, which torch.save uses, gives them."""


class Inert:
    """Stands for an object of a class that was never imported."""

    global_name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any
    items: Mapping[Any, Any] = MappingProxyType({})
    """Of a class like ``dict``."""
    members: Sequence[Any] = ()
    """Of a class like ``list`` or ``set``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.state = args, kwargs or None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        vars(self).setdefault("items", {})[key] = value

    def append(self, member: Any) -> None:
        """Remember a member, as a list would."""
        vars(self).setdefault("members", []).append(member)

    def extend(self, members: Iterable[Any]) -> None:
        """Remember several members."""
        vars(self).setdefault("members", []).extend(members)

    add, update = append, extend

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
    def __init__(
        self,
        data: bytes,
        where: object,
        storage: Callable[[tuple[Any, ...]], Any],
        any_classes: bool,
    ):
        super().__init__(io.BytesIO(data))
        self._where, self._storage, self._any_classes = where, storage, any_classes

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if full == "builtins.getattr":
            return self._attribute
        *owners, last = name.split(".")
        # A path through a module or a special attribute leads anywhere: torch.nn.modules has torch.
        if all(map(_CLASS.fullmatch, owners)) and not _SPECIAL.fullmatch(last):
            if _ALLOWED.fullmatch(full):
                return inert(full)
            if self._any_classes and full.partition(".")[0] not in _KNOWN_MODULES:
                return self._class_of_another_program(full)
        raise self._refusal(full)

    def _attribute(self, owner: Any, name: Any) -> type[Inert]:
        """A class's attribute, as torch's functions are pickled."""
        if isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str):
            of_class = _CLASS.fullmatch(owner.__name__) or owner.global_name in _BUILTIN_CLASSES
            if of_class and name.isidentifier() and not _SPECIAL.fullmatch(name):
                return inert(f"{owner.global_name}.{name}")
        raise self._refusal("builtins.getattr")

    def _class_of_another_program(self, full: str) -> type[Inert]:
        """A placeholder that stands for a class, or for a function that is not called."""

        def call(cls: type[Inert], *args: Any, **kwargs: Any) -> Inert:
            if _CLASS.fullmatch(cls.__name__):
                return cls.__new__(cls, *args, **kwargs)
            raise UnsafePickleError(
                f"{self._where}: the pickle calls {full}, which is not known here. Nothing of it "
                "was run. If the file is your own, load it with the program that saved it, put "
                "plain values in the place of what the function makes, and save it again."
            )

        meta = type("_Meta", (type,), {"__call__": call})
        made: type[Inert] = meta(full.rpartition(".")[2], (Inert,), {"global_name": full})
        return made

    def _refusal(self, full: str) -> UnsafePickleError:
        return UnsafePickleError(
            f"{self._where}: the pickle asks for {full}, which has no place in a checkpoint. "
            "Nothing of it was run. Don't load this file with other tools either."
        )

    def persistent_load(self, pid: Any) -> Any:
        return self._storage(pid)


def loads(
    data: bytes,
    where: object,
    storage: Callable[[tuple[Any, ...]], Any] = tuple,
    *,
    any_classes: bool = False,
) -> Any:
    """Read a pickle into plain values and :class:`Inert` placeholders.

    Args:
        data: the pickle.
        where: the file, for messages.
        storage: called with each persistent id (torch's storages).
        any_classes: whether classes of programs that are not known here become placeholders too.

    Raises:
        UnsafePickleError: it names a global that is not on the allow-list, or is no pickle.
    """
    try:
        return _Reader(data, where, storage, any_classes).load()
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
