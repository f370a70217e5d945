"""The opcodes of pickles, each of which does something to a Machine, and the loop over them.

They are those of the standard library's pickletools.py, which also says what each does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from megatron_olmo_bridge.errors import quote

from .pickle_machine import Machine

LONGEST_INTEGER = 1000
"""Bytes."""
_BOOLS = (b"00", b"01")
"""As numbers, in protocols 0 and 1."""
_DECIMAL = re.compile(rb"-?(0|[1-9][0-9]{0,2000})")
_Step = Callable[[Machine], object]
_UINT32 = struct.Struct("<I")


def _constant(value: Any) -> _Step:
    return lambda m: m.stack.append(value)


def _container(kind: type[Any]) -> _Step:
    return lambda m: m.push_container(kind())


def _empty_set(m: Machine) -> None:
    m.spend(3)
    m.push_container(set())


def _packed(layout: str) -> Callable[[Machine], Any]:
    """Read a number of fixed size."""
    packed = struct.Struct(layout)

    def read(m: Machine) -> Any:
        (value,) = packed.unpack_from(m.data, m.position)
        m.position += packed.size
        return value

    return read


def _number(layout: str) -> _Step:
    read = _packed(layout)
    return lambda m: m.stack.append(read(m))


def _counted(layout: str, decode: Callable[[bytes], Any]) -> _Step:
    """Push what follows its length."""
    length = _packed(layout)
    return lambda m: m.stack.append(decode(m.take(length(m))))


def _with(read: Callable[[Machine], Any], do: Callable[[Machine, Any], None]) -> _Step:
    """Do something with what is read."""
    return lambda m: do(m, read(m))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _ascii(data: bytes) -> str:
    return data.decode("ascii")


def _integer(data: bytes) -> int:
    if len(data) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(data)} bytes is too long")
    return int.from_bytes(data, "little", signed=True)


def _int_line(m: Machine) -> None:
    text = m.line()
    m.stack.append(text == b"01" if text in _BOOLS else _decimal(text))


def _decimal(text: bytes) -> int:
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"{quote(text)} is not a number")
    return int(text)


def _float_line(m: Machine) -> None:
    text = m.line()
    if len(text) > 100 or b"_" in text:
        raise ValueError(f"{quote(text)} is not a number")
    m.stack.append(float(text))


def _tuple_of(count: int) -> _Step:
    def step(m: Machine) -> None:
        items = tuple(m.stack[-count:])
        if len(items) < count:
            raise IndexError
        del m.stack[-count:]
        m.push_container(items)

    return step


def _dict(m: Machine) -> None:
    flat, made = m.group(), dict[Any, Any]()
    m.set_items(made, flat)
    m.push_container(made)


def _frozenset(m: Machine) -> None:
    members = m.group()
    m.check_keys(members)
    m.spend(3)
    m.push_container(frozenset(members))


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def _set_items(m: Machine) -> None:
    flat = m.group()
    m.set_items(m.stack[-1], flat)


def _append(m: Machine) -> None:
    value = m.stack.pop()
    m.add_members(m.stack[-1], [value])


def _extend(m: Machine) -> None:
    members = m.group()
    m.add_members(m.stack[-1], members)


def _reduce(m: Machine) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    m.make(function, args, is_call=True)


def _new(m: Machine) -> None:
    args, cls = m.stack.pop(), m.stack.pop()
    m.make(cls, args, is_call=False)


def _new_with_keywords(m: Machine) -> None:
    keywords, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.make(cls, args, is_call=False)
    if keywords:
        m.build(keywords)


def _instance(m: Machine) -> None:
    module, name = _text(m.line()), _text(m.line())
    args = tuple(m.group())
    m.named(module, name)
    m.make(m.stack.pop(), args, is_call=True)


def _object(m: Machine) -> None:
    cls, *args = m.group()
    m.make(cls, tuple(args), is_call=True)


def _global(m: Machine) -> None:
    m.named(_text(m.line()), _text(m.line()))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise ValueError("it names a global by what is not text")
    m.named(module, name)


def _build(m: Machine) -> None:
    m.build(m.stack.pop())


def _persistent(m: Machine) -> None:
    m.stack.append(m.persistent(m.stack.pop()))


def _protocol(m: Machine) -> None:
    if (protocol := m.take(1)[0]) > 5:
        raise ValueError(f"it is of protocol {protocol}")


def _refuse(m: Machine) -> None:
    raise ValueError(f"the opcode at byte {m.position - 1} has no place in a checkpoint")


_STOP, _MEMOIZE, _BININT1, _BININT2, _BINGET, _LONG_BINGET = b".\x94KMhj"
_OPCODES: list[_Step] = [_refuse] * 256
for _code, _step in {
    # numbers and constants
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"J": _number("<i"),
    b"G": _number(">d"),
    b"I": _int_line,
    b"F": _float_line,
    b"L": lambda m: m.stack.append(_decimal(m.line().removesuffix(b"L"))),
    b"\x8a": _counted("<B", _integer),
    b"\x8b": _counted("<I", _integer),
    # text and bytes
    b"X": _counted("<I", _text),
    b"\x8c": _counted("<B", _text),
    b"\x8d": _counted("<Q", _text),
    b"V": lambda m: m.stack.append(m.line().decode("raw-unicode-escape")),
    b"U": _counted("<B", _ascii),
    b"T": _counted("<I", _ascii),
    b"B": _counted("<I", bytes),
    b"C": _counted("<B", bytes),
    b"\x8e": _counted("<Q", bytes),
    b"\x96": _counted("<Q", bytes),
    # containers
    b"]": _container(list),
    b"}": _container(dict),
    b")": _constant(()),
    b"\x8f": _empty_set,
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"t": lambda m: m.push_container(tuple(m.group())),
    b"l": lambda m: m.push_container(m.group()),
    b"d": _dict,
    b"\x91": _frozenset,
    b"s": _set_item,
    b"u": _set_items,
    b"a": _append,
    b"e": _extend,
    b"\x90": _extend,
    # the stack and the memo
    b"(": Machine.mark,
    b"0": Machine.pop,
    b"1": Machine.group,
    b"2": lambda m: m.stack.append(m.stack[-1]),
    b"q": _with(_packed("<B"), Machine.remember),
    b"r": _with(_packed("<I"), Machine.remember),
    b"p": _with(lambda m: _decimal(m.line()), Machine.remember),
    b"g": _with(lambda m: _decimal(m.line()), Machine.recall),
    # globals and objects
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _new,
    b"\x92": _new_with_keywords,
    b"i": _instance,
    b"o": _object,
    b"b": _build,
    b"Q": _persistent,
    # what surrounds them
    b"\x80": _protocol,
    b"\x95": lambda m: m.take(8),
}.items():
    _OPCODES[_code[0]] = _step


def run(machine: Machine) -> Any:
    """Return what the pickle makes.

    Raises:
        ValueError: it is damaged, or asks for more than it may.
    """
    data, memo = machine.data, machine._memo
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
