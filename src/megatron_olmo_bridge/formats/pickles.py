"""Pickles read and written without running or importing anything that they name.

A pickle is a program. Reading it here puts an inert placeholder in the place of each class and
function on an allow-list, and refuses every other; writing emits opcodes of protocol 2 from the
same placeholders. So neither torch nor megatron-core is needed to read or write a checkpoint's
metadata, and the same value always gives the same bytes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from megatron_olmo_bridge.errors import UnsafePickleError

from .inert import Inert
from .pickle_globals import Globals
from .pickle_machine import Machine
from .pickle_opcodes import run


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
        storage: called with each persistent id (torch's name of a storage); returns its value.
        any_classes: allow classes of all modules but torch, numpy and the standard library.

    Raises:
        UnsafePickleError: it names a class or function that is not allowed, or is not a sound
            pickle.
    """
    try:
        return run(Machine(data, Globals(where, any_classes), storage))
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsafePickleError(f"{where}: not a readable pickle ({error})") from error


class Persistent(tuple[Any, ...]):
    """A persistent id, by which torch refers to a storage."""


def dumps(value: Any) -> bytes:
    """Pickle plain values, placeholders and :class:`Persistent` ids by protocol 2, without a memo.

    An :class:`Inert` class is written as a global; an instance with a state as an object that
    ``cls.__new__`` makes; one without a state as a call of the global with its arguments.

    Raises:
        TypeError: a value is of another type.
    """
    out = bytearray(pickle.PROTO + b"\x02")
    _write(value, out)
    return bytes(out + pickle.STOP)


def _write(value: Any, out: bytearray) -> None:
    match value:
        case None:
            out += pickle.NONE
        case bool():
            out += pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            if -(2**31) <= value < 2**31:
                out += pickle.BININT + struct.pack("<i", value)
            else:
                data = pickle.encode_long(value)
                out += pickle.LONG1 + bytes([len(data)]) + data
        case float():
            out += pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            data = value.encode()
            out += pickle.BINUNICODE + struct.pack("<I", len(data)) + data
        case Persistent():
            _write(tuple(value), out)
            out += pickle.BINPERSID
        case tuple():
            _write_all(pickle.MARK, value, pickle.TUPLE, out)
        case list():
            _write_all(pickle.EMPTY_LIST + pickle.MARK, value, pickle.APPENDS, out)
        case dict():
            flat = chain.from_iterable(value.items())
            _write_all(pickle.EMPTY_DICT + pickle.MARK, flat, pickle.SETITEMS, out)
        case type() if issubclass(value, Inert):
            module, _, name = value.global_name.rpartition(".")
            out += pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Inert():
            _write(type(value), out)
            _write(value.args, out)
            if value.state is None:
                out += pickle.REDUCE
            else:
                out += pickle.NEWOBJ
                _write(value.state, out)
                out += pickle.BUILD
        case _:
            raise TypeError(f"cannot pickle a {type(value).__name__}")


def _write_all(begin: bytes, values: Iterable[Any], end: bytes, out: bytearray) -> None:
    out += begin
    for value in values:
        _write(value, out)
    out += end
