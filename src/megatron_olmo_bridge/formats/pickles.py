"""Pickles read and written without running or importing anything that they name.

A pickle is a program. Reading one here maps every global name on an allow-list to an inert
placeholder that only remembers what it was given, and refuses every other name; writing emits the
opcodes of protocol 2 from the same placeholders. So neither torch nor megatron need be installed
to read or write a checkpoint's metadata, and the same input gives the same bytes.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

from megatron_olmo_bridge.errors import UnsafePickleError, escape

from .inert import Inert, inert, is_class
from .pickle_machine import Machine
from .pickle_opcodes import run

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
    r"|collections\.OrderedDict|builtins\.(set|frozenset|bytearray|slice|complex|getattr)"
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
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
"""Modules by the names that protocol 2, which torch.save uses, gives them."""


class _Reader(Machine):
    def __init__(
        self,
        data: bytes,
        where: object,
        storage: Callable[[tuple[Any, ...]], Any],
        any_classes: bool,
    ):
        super().__init__(data)
        self._unknown_functions: set[str] = set()
        self._where, self._storage, self._any_classes = where, storage, any_classes

    def find_global(self, module: str, name: str) -> type[Inert]:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        *owners, last = name.split(".")
        # A path through a module or a special attribute leads anywhere: torch.nn.modules has torch.
        if all(map(_CLASS.fullmatch, owners)) and not _SPECIAL.fullmatch(last):
            if _ALLOWED.fullmatch(full):
                return inert(full)
            if self._any_classes and full.partition(".")[0] not in _KNOWN_MODULES:
                if not _CLASS.fullmatch(last):
                    self._unknown_functions.add(full)
                return inert(full)
        raise self._refusal(full)

    def call(self, function: type[Inert], args: tuple[Any, ...]) -> Any:
        full = function.global_name
        if full == "builtins.getattr":
            return self._attribute(*args)
        if full in self._unknown_functions:
            raise UnsafePickleError(
                f"{self._where}: the pickle calls {full}, which is not known here. Nothing of it "
                "was run. If the file is your own, load it with the program that saved it, put "
                "plain values in the place of what the function makes, and save it again."
            )
        return function.called_with(args)

    def _attribute(self, owner: Any = None, name: Any = None, *rest: Any) -> type[Inert]:
        """A class's attribute, as torch's functions are pickled."""
        if is_class(owner) and isinstance(name, str) and not rest:
            of_class = _CLASS.fullmatch(owner.__name__) or owner.global_name in _BUILTIN_CLASSES
            if of_class and name.isidentifier() and not _SPECIAL.fullmatch(name):
                full = f"{owner.global_name}.{name}"
                return self.once(("builtins.getattr", full), lambda *_: inert(full))
        raise self._refusal("builtins.getattr")

    def _refusal(self, full: str) -> UnsafePickleError:
        return UnsafePickleError(
            f"{self._where}: the pickle asks for {escape(full)}, which has no place in a "
            "checkpoint. Nothing of it was run. Don't load this file with other tools either."
        )

    def persistent(self, pid: Any) -> Any:
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
        return run(_Reader(data, where, storage, any_classes))
    except (ValueError, TypeError, AttributeError) as error:
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
