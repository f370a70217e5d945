"""The state of a pickle while it runs, and what its opcodes may do to it.

Running builds plain values and placeholders; nothing is imported and nothing called. The standard
library's unpickler could be restricted to that, but not in what a hostile pickle costs: an array as
long as the highest memo index, keys whose hash takes forever or overflows the C stack, hundreds of
bytes of memory for each byte of the pickle. Here every step has a bounded cost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Any

from megatron_olmo_bridge.errors import quote

from .inert import Inert, is_class
from .pickle_globals import Globals

FREE_OBJECTS = 2**16
BYTES_PER_OBJECT = 4
"""A pickle may make ``FREE_OBJECTS`` containers and objects, and one more for each 4 bytes of its
own (torch's pickles have at least 6 bytes for each). An object takes up to 80 bytes of memory. Sets
and dictionaries that are not empty take as much as 4 objects and are counted so."""
MAX_MARKS = 10_000
"""Incomplete lists inside each other. Python's own pickler reaches some 500."""
MAX_TUPLE_KEYS = 4000
"""Tuples can be made to have equal hashes, which makes a dictionary quadratic in their number."""
MAX_TUPLE_KEY_LENGTH = 16
MAX_INTEGER_KEY = 2**60
"""Below the modulus of Python's hash of integers, so that no two keys have equal hashes."""
_SCALARS = (str, int, float, bool, bytes, type(None), Inert, type)


class Machine:
    """A pickle that is being run."""

    def __init__(
        self, data: bytes, names: Globals, storage: Callable[[tuple[Any, ...]], Any]
    ) -> None:
        """Begin at the first byte.

        Args:
            data: the pickle.
            names: decides which classes and functions it may name.
            storage: called with each persistent id; returns what stands for it.
        """
        self.data, self.position = data, 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.names, self.storage = names, storage
        self._stacks_below: list[list[Any]] = []
        """The stack under each mark; ``stack`` is what stands above the last mark."""
        self._objects_left = FREE_OBJECTS + len(data) // BYTES_PER_OBJECT
        self._tuple_keys_left = MAX_TUPLE_KEYS

    # ------------------------------------------------------------------------------- the pickle

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes of the pickle."""
        end = self.position + size
        if end > len(self.data):
            raise ValueError(f"{size} bytes from byte {self.position} on are more than it has")
        read = self.data[self.position : end]
        self.position = end
        return read

    def read_line(self) -> bytes:
        """Return the rest of a line, and go to the next."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise ValueError(f"the line at byte {self.position} has no end")
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    def number(self, layout: Struct) -> Any:
        """Return the next number."""
        (value,) = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return value

    def counted(self, layout: Struct) -> bytes:
        """Return the bytes that follow a number, which says how many they are."""
        return self.read(self.number(layout))

    # -------------------------------------------------------------------------------- the stack

    def push_object(self, value: Any, cost: int = 1) -> None:
        """Push a container or an object, which counts as ``cost`` of them."""
        self.count_objects(cost)
        self.stack.append(value)

    def count_objects(self, count: int) -> None:
        """Raise ValueError if the pickle makes more objects than its size allows."""
        self._objects_left -= count
        if self._objects_left < 0:
            raise ValueError(f"it makes more objects than a pickle of {len(self.data)} bytes may")

    def pop(self, count: int) -> list[Any]:
        """Take the topmost values off the stack; the top is the last of them."""
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError
        del self.stack[-count:]
        return values

    def mark(self) -> None:
        """Begin a group of values."""
        if len(self._stacks_below) >= MAX_MARKS:
            raise ValueError(f"more than {MAX_MARKS} lists inside each other")
        self._stacks_below.append(self.stack)
        self.stack = []

    def pop_group(self) -> list[Any]:
        """Take the values above the last mark off the stack, and the mark."""
        group = self.stack
        self.stack = self._stacks_below.pop()
        return group

    def drop(self) -> None:
        """Take the top off the stack, which may be a mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.pop_group()

    def put(self, index: int) -> None:
        """Keep the top of the stack in the memo. Picklers count the indices up from 0."""
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif 0 <= index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            raise ValueError(f"memo index {quote(index)} where the next is {len(self.memo)}")

    def get(self, index: int) -> None:
        """Push what the memo holds."""
        if index < 0:
            raise IndexError
        self.stack.append(self.memo[index])

    # ------------------------------------------------------------------------------- containers

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Raise ValueError for keys whose hash takes long, or can be made to equal others'."""
        for key in keys:
            if type(key) is str:
                continue
            if type(key) is tuple:
                self._tuple_keys_left -= 1
                short = len(key) <= MAX_TUPLE_KEY_LENGTH and self._tuple_keys_left >= 0
                if not (short and all(isinstance(item, _SCALARS) for item in key)):
                    raise ValueError("it has too many or too large keys that are tuples")
                self.check_keys(key)
            elif not isinstance(key, _SCALARS):
                raise ValueError(f"a {type(key).__name__} can't be a key")
            elif isinstance(key, int) and abs(key) >= MAX_INTEGER_KEY:
                raise ValueError(f"{quote(key)} is too large for a key")

    def set_items(self, flat: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary or placeholder on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, Inert):
            if not target.items:
                target.items = {}
            target = target.items
        if not isinstance(target, dict) or len(flat) % 2:
            raise ValueError("it sets items of something that is not a dictionary")
        if not target:
            self.count_objects(3)
        keys = flat[::2]
        self.check_keys(keys)
        target.update(zip(keys, flat[1::2], strict=True))

    def add_members(self, members: list[Any]) -> None:
        """Put values into the list, set or placeholder on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, set):
            self.check_keys(members)
            target.update(members)
            return
        if isinstance(target, Inert):
            if not target.members:
                target.members = []
            target = target.members
        if not isinstance(target, list):
            raise ValueError("it adds members to something that is not a list or a set")
        target.extend(members)

    # ---------------------------------------------------------------------------------- objects

    def make(self, cls: Any, args: Any, *, is_call: bool) -> None:
        """Push the placeholder of a call's result, or of an object by ``cls.__new__``."""
        if not is_class(cls) or type(args) is not tuple:
            raise ValueError("it calls something that is not a global")
        self.count_objects(1)
        if cls.global_name in _PLAIN:
            self._make_plain(_PLAIN[cls.global_name], args)
        else:
            self.stack.append(self.names.call(cls, args) if is_call else cls.called_with(args))

    def _make_plain(self, cls: type[Any], args: tuple[Any, ...]) -> None:
        """Push a set, frozenset or OrderedDict of the members or pairs in a list."""
        members = args[0] if len(args) == 1 else ()
        if not isinstance(members, list | tuple | set | frozenset) or len(args) > 1:
            raise ValueError("it makes a set or an OrderedDict of something that is not a list")
        self.count_objects(3 + len(members))
        if cls is not OrderedDict:
            self.check_keys(members)
            self.stack.append(cls(members))
            return
        self.stack.append(OrderedDict())
        for pair in members:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("it makes an OrderedDict of something other than pairs")
            self.set_items(list(pair))

    def build(self, state: Any) -> None:
        """Set the state of the object on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, OrderedDict):  # its attributes are not needed
            raise ValueError(f"it sets the state of a {type(target).__name__}")


_PLAIN: dict[str, type[Any]] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
}
"""Classes of which real objects are made."""
