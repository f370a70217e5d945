"""Placeholders for the objects and functions that a pickle names. None of them is ever imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeGuard

_NO_ITEMS: Mapping[Any, Any] = MappingProxyType({})


class Inert:
    """Stands for an object of a class that was never imported."""

    __slots__ = ("args", "items", "members", "state")
    global_name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any
    items: Mapping[Any, Any]
    """Of a class like ``dict``."""
    members: Sequence[Any]
    """Of a class like ``list`` or ``set``."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state, self.items, self.members = args, None, _NO_ITEMS, ()

    @classmethod
    def called_with(cls, args: tuple[Any, ...]) -> Inert:
        """The same as ``cls(*args)``, without a copy of the arguments."""
        self = cls.__new__(cls)
        self.args, self.state, self.items, self.members = args, None, _NO_ITEMS, ()
        return self

    def __repr__(self) -> str:
        return f"<{self.global_name}>"  # what it holds may have no end


def is_class(value: object) -> TypeGuard[type[Inert]]:
    """Whether a value stands for a class or a function, not for an object."""
    return isinstance(value, type) and issubclass(value, Inert)


def inert(name: str) -> type[Inert]:
    """The placeholder class for a global, ``inert("torch.Size")``."""
    members = {"global_name": name, "__slots__": ()}
    return type(name.rpartition(".")[2], (Inert,), members)


def built(name: str, state: Any) -> Inert:
    """A placeholder object whose attributes are ``state``."""
    placeholder = inert(name)()
    placeholder.state = state
    return placeholder
