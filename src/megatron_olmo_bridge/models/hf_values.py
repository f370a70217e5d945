"""Read values of a ``config.json``, each checked for its type and range."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import islice
from typing import Any

from megatron_olmo_bridge.errors import InputError, quote

COUNT = "a positive whole number"
# Limits far above real models: what is built per layer, head or expert takes time and memory before
# any tensor is read.
MAX_COUNT = 2**31 - 1
MAX_LAYERS = 100_000
MAX_HEADS = MAX_EXPERTS = 4096
MAX_LABELS = 100_000
_SHOWN = 200
"""Maximum number of characters of a value in a message."""


class HFValues:
    """Values of a JSON object by key, with defaults for absent keys.

    A value of another type is an error, as it is for transformers' strict config classes: ``"8"``
    and 8.0 are not 8, and null does not stand for the default.
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
            values: values as read.
            defaults: values of absent keys.
            aliases: other names of keys, each with the key.
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
        return int(self._checked(key, is_count(value, most), kind))

    def optional_count(self, key: str) -> int | None:
        """Return a positive whole number, or None for null."""
        return None if self.get(key) is None else self.count(key)

    def optional_whole(self, key: str) -> int | None:
        """Return a whole number of any sign, or None for null."""
        value: int | None = self.get(key)
        is_whole = type(value) is int and abs(value) <= MAX_COUNT
        self._checked(key, value is None or is_whole, "a whole number or null")
        return value

    def number(self, key: str, *, least: float | None = None) -> float:
        """Return a finite number that is at least ``least``, or above 0 if that is None."""
        value = self.get(key)
        kind = "a number above 0" if least is None else f"a number of at least {least:g}"
        # The upper limit excludes NaN, infinity, and whole numbers beyond a float.
        is_finite = type(value) in (int, float) and abs(value) <= sys.float_info.max
        is_sound = is_finite and (value > 0 if least is None else value >= least)
        return float(self._checked(key, is_sound, kind))

    def optional_number(self, key: str) -> float | None:
        """Return a finite number above 0, or None for null."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        return bool(self._checked(key, type(self.get(key)) is bool, "true or false"))

    def text(self, key: str) -> str:
        """Return a string."""
        return str(self._checked(key, isinstance(self.get(key), str), "a string"))

    def table(self, key: str) -> dict[str, Any]:
        """Return an object; an empty one for null."""
        value = self.get(key)
        if value is None:
            return {}
        return dict(self._checked(key, isinstance(value, dict), "an object or null"))

    def _checked(self, key: str, is_sound: bool, kind: str) -> Any:
        if key not in self._values:
            raise InputError(f"{key}{self._where} is missing: it must be {kind}")
        if not is_sound:
            raise InputError(f"{key}{self._where} must be {kind}, not {shown(self.get(key))}")
        return self.get(key)


def is_count(value: object, most: int = MAX_COUNT) -> bool:
    """Return whether ``value`` is a whole number from 1 to ``most``; true and 8.0 are not."""
    return type(value) is int and 1 <= value <= most


def shown(value: object) -> str:
    """Return a value as JSON, truncated."""
    text = json.dumps(_bounded(value, depth=2), default=quote)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} [...]"


def _bounded(value: object, depth: int) -> object:
    """Return what is shown of a value: a checkpoint's args may hold very long lists."""
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
