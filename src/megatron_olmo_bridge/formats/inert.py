"""Placeholders for the classes, functions and objects of a pickle. Nothing is ever imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeGuard

_NO_ITEMS: Mapping[Any, Any] = MappingProxyType({})


class Inert:
    """Placeholder for an object; each of its subclasses, for a class or function."""

    __slots__ = ("args", "items", "members", "state")
    global_name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any
    items: Mapping[Any, Any]
    """What an object of a class like ``dict`` holds."""
    members: Sequence[Any]
    """What an object of a class like ``list`` or ``set`` holds."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state, self.items, self.members = args, None, _NO_ITEMS, ()

    @classmethod
    def called_with(cls, args: tuple[Any, ...]) -> Inert:
        """Return ``cls(*args)``, but without a copy of ``args``, which calls may share."""
        called = cls()
        called.args = args
        return called

    def __repr__(self) -> str:
        return f"<{self.global_name}>"  # without what it holds, which may be endless


def is_class(value: object) -> TypeGuard[type[Inert]]:
    """Return whether a value is the placeholder of a class or function, not of an object."""
    return isinstance(value, type) and issubclass(value, Inert)


def inert(name: str) -> type[Inert]:
    """Return a placeholder for the class or function of this full name, ``torch.Size``."""
    members = {"global_name": name, "__slots__": ()}
    return type(name.rpartition(".")[2], (Inert,), members)


def built(name: str, state: Any) -> Inert:
    """Return a placeholder for an object of this class, whose attributes are ``state``."""
    placeholder = inert(name)()
    placeholder.state = state
    return placeholder
