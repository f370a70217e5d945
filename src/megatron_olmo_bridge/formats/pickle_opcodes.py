"""Run a pickle: what each opcode does to a :class:`Machine`, and the loop over them.

Source: the standard library's ``pickletools.py``, which describes every opcode.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable
from struct import Struct
from typing import Any

from megatron_olmo_bridge.errors import quote

from .pickle_machine import Machine

MAX_PROTOCOL = 5
MAX_INTEGER_BYTES = 1000
_UINT8, _UINT32, _UINT64 = Struct("<B"), Struct("<I"), Struct("<Q")
_INT32, _FLOAT64 = Struct("<i"), Struct(">d")
_BOOLS = {b"00": False, b"01": True}
"""How protocols 0 and 1 write them: as an INT."""
_DECIMAL = re.compile(rb"-?(0|[1-9][0-9]{0,2000})")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _integer(data: bytes) -> int:
    if len(data) > MAX_INTEGER_BYTES:
        raise ValueError(f"an integer of {len(data)} bytes is too long")
    return int.from_bytes(data, "little", signed=True)


def _decimal(text: bytes) -> int:
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"{quote(text)} is not a number")
    return int(text)


def _int(text: bytes) -> int:
    return _BOOLS[text] if text in _BOOLS else _decimal(text)


def _float(text: bytes) -> float:
    if len(text) > 100 or b"_" in text:
        raise ValueError(f"{quote(text)} is not a number")
    return float(text)


def _dict(m: Machine) -> None:
    flat = m.pop_group()
    m.push_object({})
    m.set_items(flat)


def _frozenset(m: Machine) -> None:
    members = m.pop_group()
    m.check_keys(members)
    m.push_object(frozenset(members), 4)


def _new_with_keywords(m: Machine) -> None:
    cls, args, keywords = m.pop(3)
    m.make(cls, args, is_call=False)
    if keywords:
        m.build(keywords)


def _instance(m: Machine) -> None:
    module, name = _text(m.read_line()), _text(m.read_line())
    args = tuple(m.pop_group())
    m.make(m.names.find(module, name), args, is_call=True)


def _object(m: Machine) -> None:
    cls, *args = m.pop_group()
    m.make(cls, tuple(args), is_call=True)


def _stack_global(m: Machine) -> None:
    module, name = m.pop(2)
    if not (isinstance(name, str) and isinstance(module, str)):
        raise ValueError("it names a global by something that is not text")
    m.stack.append(m.names.find(module, name))


def _protocol(m: Machine) -> None:
    if (protocol := m.number(_UINT8)) > MAX_PROTOCOL:
        raise ValueError(f"it is of protocol {protocol}")


def _refuse(m: Machine) -> None:
    raise ValueError(f"the opcode at byte {m.position - 1} has no place in a checkpoint")


_OPCODES: list[Callable[[Machine], object]] = [_refuse] * 256
for _code, _step in {
    # numbers and constants
    pickle.NONE: lambda m: m.stack.append(None),
    pickle.NEWTRUE: lambda m: m.stack.append(True),
    pickle.NEWFALSE: lambda m: m.stack.append(False),
    pickle.BININT: lambda m: m.stack.append(m.number(_INT32)),
    pickle.BINFLOAT: lambda m: m.stack.append(m.number(_FLOAT64)),
    pickle.INT: lambda m: m.stack.append(_int(m.read_line())),
    pickle.FLOAT: lambda m: m.stack.append(_float(m.read_line())),
    pickle.LONG: lambda m: m.stack.append(_decimal(m.read_line().removesuffix(b"L"))),
    pickle.LONG1: lambda m: m.stack.append(_integer(m.counted(_UINT8))),
    pickle.LONG4: lambda m: m.stack.append(_integer(m.counted(_UINT32))),
    # text and bytes
    pickle.BINUNICODE: lambda m: m.stack.append(_text(m.counted(_UINT32))),
    pickle.SHORT_BINUNICODE: lambda m: m.stack.append(_text(m.counted(_UINT8))),
    pickle.BINUNICODE8: lambda m: m.stack.append(_text(m.counted(_UINT64))),
    pickle.UNICODE: lambda m: m.stack.append(m.read_line().decode("raw-unicode-escape")),
    pickle.SHORT_BINSTRING: lambda m: m.stack.append(m.counted(_UINT8).decode("ascii")),
    pickle.BINSTRING: lambda m: m.stack.append(m.counted(_UINT32).decode("ascii")),
    pickle.BINBYTES: lambda m: m.stack.append(m.counted(_UINT32)),
    pickle.SHORT_BINBYTES: lambda m: m.stack.append(m.counted(_UINT8)),
    pickle.BINBYTES8: lambda m: m.stack.append(m.counted(_UINT64)),
    pickle.BYTEARRAY8: lambda m: m.stack.append(m.counted(_UINT64)),
    # containers
    pickle.EMPTY_LIST: lambda m: m.push_object([]),
    pickle.EMPTY_DICT: lambda m: m.push_object({}),
    pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
    pickle.EMPTY_SET: lambda m: m.push_object(set(), 4),
    pickle.TUPLE1: lambda m: m.push_object(tuple(m.pop(1))),
    pickle.TUPLE2: lambda m: m.push_object(tuple(m.pop(2))),
    pickle.TUPLE3: lambda m: m.push_object(tuple(m.pop(3))),
    pickle.TUPLE: lambda m: m.push_object(tuple(m.pop_group())),
    pickle.LIST: lambda m: m.push_object(m.pop_group()),
    pickle.DICT: _dict,
    pickle.FROZENSET: _frozenset,
    pickle.SETITEM: lambda m: m.set_items(m.pop(2)),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_group()),
    pickle.APPEND: lambda m: m.add_members(m.pop(1)),
    pickle.APPENDS: lambda m: m.add_members(m.pop_group()),
    pickle.ADDITEMS: lambda m: m.add_members(m.pop_group()),
    # the stack and the memo
    pickle.MARK: Machine.mark,
    pickle.POP: Machine.drop,
    pickle.POP_MARK: Machine.pop_group,
    pickle.DUP: lambda m: m.stack.append(m.stack[-1]),
    pickle.BINPUT: lambda m: m.put(m.number(_UINT8)),
    pickle.LONG_BINPUT: lambda m: m.put(m.number(_UINT32)),
    pickle.PUT: lambda m: m.put(_decimal(m.read_line())),
    pickle.GET: lambda m: m.get(_decimal(m.read_line())),
    # globals and objects
    pickle.GLOBAL: lambda m: m.stack.append(
        m.names.find(_text(m.read_line()), _text(m.read_line()))
    ),
    pickle.STACK_GLOBAL: _stack_global,
    pickle.REDUCE: lambda m: m.make(*m.pop(2), is_call=True),
    pickle.NEWOBJ: lambda m: m.make(*m.pop(2), is_call=False),
    pickle.NEWOBJ_EX: _new_with_keywords,
    pickle.INST: _instance,
    pickle.OBJ: _object,
    pickle.BUILD: lambda m: m.build(m.stack.pop()),
    pickle.BINPERSID: lambda m: m.stack.append(m.storage(m.stack.pop())),
    # what surrounds them
    pickle.PROTO: _protocol,
    pickle.FRAME: lambda m: m.read(8),
}.items():
    _OPCODES[ord(_code)] = _step

_STOP, _MEMOIZE = ord(pickle.STOP), ord(pickle.MEMOIZE)
_BININT1, _BININT2 = ord(pickle.BININT1), ord(pickle.BININT2)
_BINGET, _LONG_BINGET = ord(pickle.BINGET), ord(pickle.LONG_BINGET)


def run(machine: Machine) -> Any:
    """Return the value that the pickle makes.

    Raises:
        ValueError: it is damaged, or exceeds a limit.
        UnsafePickleError: it names a class or function that is not allowed.
    """
    data, memo = machine.data, machine.memo
    stack, position = machine.stack, 0
    try:
        while True:
            code = data[position]
            position += 1
            # More than half of the opcodes of a large .metadata. Here they take half the time.
            if code == _MEMOIZE:
                memo.append(stack[-1])
            elif code == _BININT1:
                stack.append(data[position])
                position += 1
            elif code == _BINGET:
                stack.append(memo[data[position]])
                position += 1
            elif code == _LONG_BINGET:
                (index,) = _UINT32.unpack_from(data, position)
                stack.append(memo[index])
                position += 4
            elif code == _BININT2:
                stack.append(data[position] + 256 * data[position + 1])
                position += 2
            elif code == _STOP:
                return stack.pop()
            else:
                machine.position = position
                _OPCODES[code](machine)
                stack, position = machine.stack, machine.position
    except (IndexError, struct.error):
        raise ValueError(f"it is cut off, or damaged before byte {machine.position}") from None
