"""Read values of a ``config.json``, each checked for its type and range."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from megatron_olmo_bridge.errors import InputError, quote

COUNT = "a positive whole number"
# Limits far above real models: whatever is built per layer, head or expert takes time and memory
# before any tensor is read.
MAX_COUNT = 2**31 - 1
MAX_LAYERS = 100_000
MAX_HEADS = MAX_EXPERTS = 4096
MAX_LABELS = 100_000
_SHOWN = 200
"""Most characters of a value that a message shows."""


class HFValues:
    """Values by key, with defaults for those that are absent.

    A value of another type is an error, as it is for transformers' strict config classes: ``"8"``
    and 8.0 are not 8, and null is not a default.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        where: str = "",
    ) -> None:
        """Take the values of a JSON object.

        Args:
            values: as they were read.
            defaults: by key, for those that are absent.
            aliases: other names for keys.
            where: suffix of a key in messages, for example `` in rope_parameters``.

        Raises:
            InputError: a key and an alias of it have different values.
        """
        self._values, self._where = {**defaults, **values}, where
        for alias, key in (aliases or {}).items():
            if alias not in values:
                continue
            if key in values and values[key] != values[alias]:
                raise InputError(
                    f"{key} is {shown(values[key])} and {alias}, which means the same, is "
                    f"{shown(values[alias])}"
                )
            self._values[key] = values[alias]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value unchecked."""
        return self._values.get(key, default)

    def count(self, key: str, most: int = MAX_COUNT) -> int:
        """Return a positive whole number of at most ``most``."""
        value = self.get(key)
        kind = f"{COUNT} of at most {most:,}" if type(value) is int and value > most else COUNT
        return int(self._checked(key, lambda value: is_count(value, most), kind))

    def optional_count(self, key: str) -> int | None:
        """Return a positive whole number, or None for null."""
        return None if self.get(key) is None else self.count(key)

    def optional_whole(self, key: str) -> int | None:
        """Return a whole number of any sign, or None for null."""
        if self.get(key) is None:
            return None
        return int(self._checked(key, _is_whole, "a whole number or null"))

    def number(self, key: str, *, least: float | None = None) -> float:
        """Return a finite number, above 0 or, if ``least`` is given, at least that."""
        kind = "a number above 0" if least is None else f"a number of at least {least:g}"
        return float(self._checked(key, lambda value: _is_number(value, least), kind))

    def optional_number(self, key: str) -> float | None:
        """Return a finite number above 0, or None for null."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        return bool(self._checked(key, lambda value: type(value) is bool, "true or false"))

    def text(self, key: str) -> str:
        """Return a string."""
        return str(self._checked(key, lambda value: isinstance(value, str), "a string"))

    def table(self, key: str) -> dict[str, Any]:
        """Return an object; an empty one for null."""
        value = self.get(key)
        return {} if value is None else dict(self._checked(key, _is_table, "an object or null"))

    def _checked(self, key: str, is_sound: Callable[[Any], bool], kind: str) -> Any:
        value = self.get(key)
        if key not in self._values:
            raise InputError(f"{key}{self._where} is missing: it must be {kind}")
        if not is_sound(value):
            raise InputError(f"{key}{self._where} must be {kind}, not {shown(value)}")
        return value


def check_count(name: str, value: object) -> None:
    """Raise InputError unless it is a positive whole number."""
    if not is_count(value):
        raise InputError(f"the model's {name} must be {COUNT}, not {shown(value)}")


def is_count(value: object, most: int = MAX_COUNT) -> bool:
    """Return whether it is a positive whole number of at most ``most``; true and 8.0 are not."""
    return type(value) is int and 1 <= value <= most


def shown(value: object) -> str:
    """Return a value as JSON has it, cut short."""
    text = json.dumps(_bounded(value, depth=2), default=quote)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} [...]"


def _bounded(value: object, depth: int) -> object:
    """Return a value cut to what is shown: a checkpoint's args may hold very long lists."""
    match value:
        case str():
            return value[: _SHOWN + 1]
        case list() | tuple() if depth:
            return [_bounded(item, depth - 1) for item in value[:_SHOWN]]
        case dict() if depth:
            keys = [key for key in islice(value, _SHOWN) if isinstance(key, str)]
            return {key: _bounded(value[key], depth - 1) for key in keys}
        case list() | tuple() | dict():
            return quote(value, depth=0)
        case _:
            return value


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) <= MAX_COUNT


def _is_number(value: object, least: float | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not abs(value) <= sys.float_info.max:  # NaN, infinite, or a whole number beyond a float
        return False
    return value > 0 if least is None else value >= least


def _is_table(value: object) -> bool:
    return isinstance(value, dict)
