"""What a pickle may cost: time and memory are bounded by its size, whatever it asks for."""

import pickle
import struct
import tracemalloc
from collections import OrderedDict
from typing import Any

import pytest

from megatron_olmo_bridge.errors import UnsafePickleError
from megatron_olmo_bridge.formats.inert import Inert
from megatron_olmo_bridge.formats.pickle_globals import MAX_GLOBALS, MAX_NAME_LENGTH
from megatron_olmo_bridge.formats.pickle_machine import (
    FREE_OBJECTS,
    MAX_INTEGER_KEY,
    MAX_TUPLE_KEYS,
)
from megatron_olmo_bridge.formats.pickle_opcodes import MAX_INTEGER_BYTES
from megatron_olmo_bridge.formats.pickles import loads

MEMORY = 32
"""Bytes of memory for each byte of a pickle, beyond what ``FREE_OBJECTS`` take."""


def long(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def name(full: str) -> bytes:
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def nested_pairs(levels: int) -> bytes:
    """``(x, x)`` of ``(x, x)`` of ...: a few bytes a level, and 2 ** levels values to walk over."""
    pickled = b"Nr\0\0\0\0"
    for level in range(levels):
        get = b"j" + struct.pack("<I", level)
        pickled += get + get + b"\x86r" + struct.pack("<I", level + 1)
    return pickled


def deep(levels: int) -> bytes:
    return b"N" + b"\x85" * levels


ENDLESS = nested_pairs(60)
COLLIDING = (1 << 61) - 1
"""Multiples of it all have the hash 0: the modulus of CPython's hash of integers."""

REFUSED = {
    "a memo index": (b"Nr\0\0\0\x18.", "memo index 402653184 where the next is 0"),
    "a memo index in decimal": (b"Np402653184\n.", "memo index 402653184 where the next is 0"),
    "a memo index that is one too high": (b"Nq\x01.", "memo index 1 where the next is 0"),
    "a negative memo index": (b"Np0\n0Np-1\n.", "memo index -1 where the next is 1"),
    "a memo entry before the first": (b"Np0\n0g-1\n.", "it is cut off, or damaged"),
    "a memo entry that is absent": (b"Nq\0h\x01.", "it is cut off, or damaged"),
    "marks": (b"(" * 10_001, "more than 10000 lists inside each other"),
    "a pair without end as a key": (ENDLESS + b"}j<\0\0\0Ns.", "keys that are tuples"),
    "a pair without end in a set": (b"\x8f(" + ENDLESS + b"\x90.", "keys that are tuples"),
    "a pair without end in a frozenset": (b"(" + ENDLESS + b"\x91.", "keys that are tuples"),
    "a pair without end in a set that is called": (
        name("builtins.set") + b"(" + ENDLESS + b"l\x85R.", "keys that are tuples"),
    "a deep tuple as a key": (b"}" + deep(1000) + b"Ns.", "keys that are tuples"),
    "a list as a key": (b"}]Ns.", "a list can't be a key"),
    "a key whose hash collides": (
        b"}" + long(COLLIDING) + b"Ns.", "2305843009213693951 is too large for a key"),
    "a long tuple as a key": (b"}(" + b"N" * 17 + b"tNs.", "keys that are tuples"),
    "an integer": (long(1 << (8 * MAX_INTEGER_BYTES)), "an integer of 1001 bytes is too long"),
    "digits": (b"I" + b"9" * 5000 + b"\n.", "'... is not a number"),
    "digits of a long": (b"L" + b"9" * 5000 + b"L\n.", "'... is not a number"),
    "an octal number": (b"I010\n.", "b'010' is not a number"),
    "a number with an underscore": (b"F1_0\n.", "b'1_0' is not a number"),
    "text longer than the pickle": (b"X\xff\xff\xff\x7fabc.", "2147483647 bytes from byte 5 on"),
    "text of 2 ** 64 bytes": (b"\x8d" + b"\xff" * 8 + b"abc.", "18446744073709551615 bytes from"),
    "a set of an integer": (
        name("builtins.set") + b"K\x09\x85R.", "a set or an OrderedDict of something that"),
    "an OrderedDict of an integer": (
        name("collections.OrderedDict") + b"K\x09\x85R.",
        "a set or an OrderedDict of something that"),
    "an OrderedDict of texts": (
        name("collections.OrderedDict") + b"(X\x01\0\0\0al\x85R.", "of something other than pairs"),
    "items of a list": (b"]NNs.", "sets items of something that is not a dictionary"),
    "members of a number": (b"K\x01Na.", "adds members to something that is not a list or a set"),
    "half an item": (b"}(Nu.", "sets items of something that is not a dictionary"),
    "the state of a list": (b"]}b.", "sets the state of a list"),
    "a call of a number": (b"K\x01)R.", "calls something that is not a global"),
    "a call with a list": (name("torch.Size") + b"]R.", "calls something that is not a global"),
    "a name that is not text": (b"NN\x93.", "names a global by something that is not text"),
    "a long name": (
        name("torch." + "x" * MAX_NAME_LENGTH) + b".", "or too long a name: 'torch.xxx"),
    "many names": (
        b"".join(name(f"torch.distributed.checkpoint.x{i}") for i in range(MAX_GLOBALS + 1)),
        "too many names"),
    "an extension": (b"\x82\x01.", "the opcode at byte 0 has no place in a checkpoint"),
    "a buffer out of band": (b"\x97.", "the opcode at byte 0 has no place in a checkpoint"),
    "an opcode that there is not": (b"\xff.", "the opcode at byte 0 has no place"),
    "protocol 6": (b"\x80\x06N.", "it is of protocol 6"),
    "nothing": (b"", "it is cut off"),
    "no end": (b"N", "it is cut off"),
    "a mark that is absent": (b"t.", "it is cut off, or damaged"),
    "a value below a mark": (b"N(\x85.", "it is cut off, or damaged"),
    "half a number": (b"J\x01", "it is cut off"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    pickled, says = REFUSED[what]
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickleError) as caught:
            loads(pickled, "the file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("the file: not a readable pickle (")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300
    assert peak < 16 * 2**20


MANY = 100_000
COSTLY = {
    "lists": b"(" + b"]" * MANY + b"t.",
    "sets": b"(" + b"\x8f" * MANY + b"t.",
    "dictionaries": b"(" + b"}" * MANY + b"t.",
    "dictionaries with an item": b"(" + b"}NNs" * MANY,
    "lists with an item": b"(" + b"]Na" * MANY,
    "sets with an item": b"(" + b"\x8f(N\x90" * MANY,
    "texts": b"(" + b"\x8c\x02ab\x94" * MANY,
    "numbers": b"(" + b"M\1\2" * MANY,
    "wide text": b"X" + struct.pack("<I", MANY + 4) + "\N{GRINNING FACE}".encode() + b"a" * MANY,
    "tuples of tuples": deep(MANY) + b".",
    "objects with members": name("torch.Size") + b"(" + b"2)\x81Na" * MANY,
    "objects with items": name("torch.Size") + b"(" + b"2)\x81NNs" * MANY,
    "objects": name("torch.Size") + b"(" + b"2)\x81" * MANY,
    "calls": name("torch.Size") + b"q\0(" + b"h\0)R" * MANY,
    "copies of a set": (
        b"(" + b"J\1\1\0\0" * 4000 + b"lq\0" + name("builtins.set") + b"q\1" + b"h\1h\0\x85R" * MANY
    ),
    "copies of an argument": (
        b"(" + b"N" * MANY + b"tq\0" + name("torch.Size") + b"q\1" + b"h\1h\0\x81" * (MANY // 8)
    ),
}


@pytest.mark.parametrize("what", COSTLY)
def test_memory_is_bounded_by_the_size_of_the_pickle(what: str) -> None:
    pickled = COSTLY[what]
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickleError, match=r"makes more objects than a pickle of|cut off"):
            loads(pickled, "file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY * len(pickled) + 256 * FREE_OBJECTS


def test_many_keys_that_are_tuples_are_refused() -> None:
    """Tuples can be made whose hashes are equal; then a dictionary is quadratic in them."""
    keys = [(i, 0) for i in range(MAX_TUPLE_KEYS + 1)]
    assert loads(pickle.dumps(dict.fromkeys(keys[1:])), "file") == dict.fromkeys(keys[1:])
    with pytest.raises(UnsafePickleError, match="too many or too large keys that are tuples"):
        loads(pickle.dumps(dict.fromkeys(keys)), "file")


def test_keys_that_are_read() -> None:
    keys = ["a", b"a", 0.5, None, True, 7, MAX_INTEGER_KEY - 1, 1 - MAX_INTEGER_KEY, (1, "a", None)]
    value = dict.fromkeys(keys)
    assert list(loads(pickle.dumps(value), "file")) == keys
    assert loads(pickle.dumps(set(keys)), "file") == set(keys)
    assert loads(pickle.dumps(frozenset(keys), 4), "file") == set(keys)
    assert loads(pickle.dumps({"a", 2}, 2), "file") == {"a", 2}


def test_values_without_end_are_read_where_nothing_walks_over_them() -> None:
    value = loads(ENDLESS + b".", "file")
    assert value[0] is value[1]
    assert isinstance(loads(deep(60_000) + b".", "file"), tuple)
    itself = loads(b"]q\0h\0a.", "file")
    assert itself[0] is itself


def test_a_number_is_no_length() -> None:
    for full in ("builtins.bytearray", "builtins.bytes", "builtins.range"):
        made = loads(name(full) + b"\x8a\x05\x00\xbc\xa0\x65\x01\x85R.", "file")
        assert isinstance(made, Inert)
        assert (made.global_name, made.args) == (full, (6_000_000_000,))


class Recorded:
    """Pickles with keywords, a state, items and members."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), {"_metadata": 1}, None, iter([("a", 1)])


@pytest.mark.parametrize("protocol", range(6))
def test_an_ordered_dict_with_attributes(protocol: int) -> None:
    """``torch.nn.Module.state_dict()`` has one, ``_metadata``."""
    read = loads(pickle.dumps(Recorded(), protocol), "file")
    assert read == OrderedDict(a=1)
    assert type(read) is OrderedDict


@pytest.mark.parametrize("protocol", range(6))
def test_what_python_pickles_by_any_protocol(protocol: int) -> None:
    shared = [1]
    value = [
        shared,
        shared,
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        {},
        {"k": {}},
        None,
        True,
        False,
        0,
        255,
        256,
        65536,
        -1,
        2**31,
        2**70,
        -(2**70),
        0.1,
        "",
        "näme",
        "x" * 300,
        "\ud800",
        [[], [1], [1, 2]],
    ]
    read = loads(pickle.dumps(value, protocol), "file")
    assert read == value
    assert repr(read) == repr(value)
    assert read[0] is read[1]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes(protocol: int) -> None:
    value = [b"", b"abc", b"x" * 300]
    assert loads(pickle.dumps(value, protocol), "file") == value


def test_what_older_writers_wrote() -> None:
    """Protocol 0."""
    pickled = b"(lp0\nI01\naI00\naL-5L\naF1.5\naVa\\u2603\na(dp1\nVk\nNsag0\na."
    read = loads(pickled, "file")
    assert read[:-1] == [True, False, -5, 1.5, "a\N{SNOWMAN}", {"k": None}]
    assert read[-1] is read
