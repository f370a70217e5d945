"""Pickles run as data: an interpreter that builds plain values and placeholders and calls nothing.

The standard library's unpickler would do, but for what a hostile pickle makes of it: an array as
long as a memo index says, keys whose hash is computed for ever or overflows the C stack, and
hundreds of bytes of memory for each of its own. Here every opcode is ours and its cost bounded.

The opcodes are those of pickletools.py; names of functions follow it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from megatron_olmo_bridge.errors import quote

from .inert import Inert, is_class

FREE_OBJECTS = 2**16
BYTES_PER_OBJECT = 4
"""A pickle may make ``FREE_OBJECTS`` containers and objects, and one more for each 4 bytes of its
own; those of torch take 6. Each takes up to 80 bytes of memory. A set, and a dictionary that is
not empty, takes as much as 4 of them and counts so."""
MOST_MARKS = 10_000
"""Lists in each other that are not complete. Python's own pickler reaches some 500."""
MOST_GLOBALS = 4000
"""Names of classes and functions. A checkpoint has some dozens; each takes about 1 kB."""
LONGEST_NAME = 512
MOST_TUPLE_KEYS = 4000
"""Hashes of tuples can be made to collide, which makes a dictionary quadratic in them."""
LONGEST_TUPLE_KEY = 16
LARGEST_KEY = 2**60
"""Below the modulus of Python's hash of integers, so that no two of them collide."""
_SCALARS = (str, int, float, bool, bytes, type(None), Inert, type)


class Machine:
    """Runs one pickle. What globals, calls and persistent ids are is for the subclass to say."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0
        self.stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: list[Any] = []
        self._classes: dict[tuple[str, ...], type[Inert]] = {}
        self._objects = FREE_OBJECTS + len(data) // BYTES_PER_OBJECT
        self._tuple_keys = MOST_TUPLE_KEYS

    def find_global(self, module: str, name: str) -> type[Inert]:
        """The placeholder of a global. Called once for each."""
        raise NotImplementedError

    def call(self, function: type[Inert], args: tuple[Any, ...]) -> Any:
        """What stands for a call's result."""
        raise NotImplementedError

    def persistent(self, pid: Any) -> Any:
        """What a persistent id stands for, torch's storages for example."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------ the bytes

    def take(self, size: int) -> bytes:
        """The next bytes of the pickle."""
        end = self.position + size
        if end > len(self.data):
            raise ValueError(f"{size} bytes from byte {self.position} on are more than it has")
        found = self.data[self.position : end]
        self.position = end
        return found

    def line(self) -> bytes:
        """What is left of a line, and past it."""
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise ValueError(f"the line at byte {self.position} has no end")
        found = self.data[self.position : end]
        self.position = end + 1
        return found

    # ------------------------------------------------------------------------------ the stack

    def spend(self, objects: int = 1) -> None:
        """Count containers, or members of one that is copied."""
        self._objects -= objects
        if self._objects < 0:
            raise ValueError(f"it makes more objects than a pickle of {len(self.data)} bytes may")

    def push_container(self, value: Any) -> None:
        """Push a container that an opcode made."""
        self.spend()
        self.stack.append(value)

    def mark(self) -> None:
        """Begin a group of values."""
        if len(self._below_marks) >= MOST_MARKS:
            raise ValueError(f"more than {MOST_MARKS} lists in each other")
        self._below_marks.append(self.stack)
        self.stack = []

    def group(self) -> list[Any]:
        """End a group of values."""
        found = self.stack
        self.stack = self._below_marks.pop()
        return found

    def pop(self) -> None:
        """Drop the top of the stack, which may be a mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.group()

    def remember(self, index: int) -> None:
        """Keep the top of the stack in the memo. Writers number what they keep, from 0 on."""
        if index == len(self._memo):
            self._memo.append(self.stack[-1])
        elif index < len(self._memo):
            self._memo[index] = self.stack[-1]
        else:
            raise ValueError(f"memo index {quote(index)} where the next is {len(self._memo)}")

    def recall(self, index: int) -> None:
        """Push what is in the memo."""
        self.stack.append(self._memo[index])

    # -------------------------------------------------------------------------- what it makes

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Refuse keys whose hash takes long, or may be made to collide."""
        for key in keys:
            if type(key) is str:
                continue
            if type(key) is tuple:
                self._tuple_keys -= 1
                short = len(key) <= LONGEST_TUPLE_KEY and self._tuple_keys >= 0
                if not (short and all(isinstance(item, _SCALARS) for item in key)):
                    raise ValueError("it has too many or too large keys that are tuples")
                self.check_keys(key)
            elif not isinstance(key, _SCALARS):
                raise ValueError(f"a {type(key).__name__} can't be a key")
            elif isinstance(key, int) and abs(key) >= LARGEST_KEY:
                raise ValueError(f"{quote(key)} is too large for a key")

    def set_items(self, target: Any, flat: list[Any]) -> None:
        """Give a dictionary, or what stands for one, keys and values."""
        if isinstance(target, Inert):
            if not target.items:
                target.items = {}
            target = target.items
        if not isinstance(target, dict) or len(flat) % 2:
            raise ValueError("it sets items of what is not a dictionary")
        if not target:
            self.spend(3)
        keys = flat[::2]
        self.check_keys(keys)
        target.update(zip(keys, flat[1::2], strict=True))

    def add_members(self, target: Any, members: list[Any]) -> None:
        """Give a list or a set, or what stands for one, members."""
        if isinstance(target, set):
            self.check_keys(members)
            target.update(members)
            return
        if isinstance(target, Inert):
            if not target.members:
                target.members = []
            target = target.members
        if not isinstance(target, list):
            raise ValueError("it adds members to what is not a list or a set")
        target.extend(members)

    def named(self, module: str, name: str) -> None:
        """Push the placeholder of a global."""
        self.stack.append(self.once((module, name), self.find_global))

    def once(self, key: tuple[str, ...], make: Callable[..., type[Inert]]) -> type[Inert]:
        """The class that was made of this key before, or one that is made now."""
        found = self._classes.get(key)
        if found is None:
            if sum(map(len, key)) > LONGEST_NAME or len(self._classes) >= MOST_GLOBALS:
                raise ValueError(f"it names too much: {quote('.'.join(key))}")
            found = self._classes[key] = make(*key)
        return found

    def make(self, cls: Any, args: Any, *, is_call: bool) -> None:
        """Push what stands for an object, or for the result of a call."""
        if not is_class(cls) or type(args) is not tuple:
            raise ValueError("it calls what is not a global")
        self.spend()
        if cls.global_name in _PLAIN:
            made = self._plain(_PLAIN[cls.global_name], args)
        else:
            made = self.call(cls, args) if is_call else cls.called_with(args)
        self.stack.append(made)

    def _plain(self, kind: type[Any], args: tuple[Any, ...]) -> Any:
        """A set, frozenset or OrderedDict of a list of its members or pairs."""
        members = args[0] if len(args) == 1 else ()
        if not isinstance(members, list | tuple | set | frozenset) or len(args) > 1:
            raise ValueError("it makes a set or an OrderedDict of what is not a list")
        self.spend(3 + len(members))
        if kind is not OrderedDict:
            self.check_keys(members)
            return kind(members)
        made: OrderedDict[Any, Any] = OrderedDict()
        for pair in members:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("it makes an OrderedDict of what are not pairs")
            self.set_items(made, list(pair))
        return made

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
"""Classes whose objects are made, not stood for."""
