"""Read YAML as plain data: null, booleans, numbers, strings, lists and maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megatron_olmo_bridge.errors import FormatError, quote

from .files import MAX_DEPTH, MAX_DIGITS, YAML_LIMIT, check_plain, read_small
from .remote_path import AnyPath

MAX_VALUES = 100_000
"""Values in a file; what an alias repeats is counted each time."""
_STANDARD = "tag:yaml.org,2002:"
_UNDERSTOOD = {None, "!", f"{_STANDARD}str", f"{_STANDARD}seq", f"{_STANDARD}map"}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser, where PyYAML was built with it, is ten times as fast."""


def read_yaml(file: AnyPath) -> Any:
    """Return the value in a YAML file.

    Scalars have the types of PyYAML's safe loader, except that dates are strings. Keys are strings
    as they are written. A value with a program's own tag (``!!python/tuple``) is the string
    ``<tag>``. An alias is the value of its anchor.

    Raises:
        FormatError: the file is not sound, has too many or too deeply nested values, or has what is
            not understood: another tag of YAML's own (``!!set``), a merge key, a key that is not a
            scalar or occurs twice, an alias inside its own anchor; or see :func:`read_small`.
        InputError, FileNotFoundError, PermissionError: see :func:`open_regular`.
    """
    data = read_small(file, YAML_LIMIT)
    try:
        text = data.decode()
        value = _build(_LOADER(text))
        check_plain(value, text)
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise FormatError(f"{file}: not sound YAML: {why}{line}") from error
    return value


@dataclass
class _Unfinished:
    """A list or map whose end was not read yet."""

    value: list[Any] | dict[str, Any]
    anchor: str | None
    tag: str | None
    begin: int
    """Number of values before it."""
    key: str | None = None

    def add(self, value: Any, event: yaml.Event) -> None:
        if isinstance(self.value, list):
            self.value.append(value)
        elif self.key is not None:
            self.value[self.key], self.key = value, None
        elif not isinstance(event, yaml.ScalarEvent) or event.value == "<<":
            raise ValueError("a key that is a list, a map, an alias or << is not understood")
        elif event.value in self.value:
            raise ValueError(f"{quote(event.value)} stands in a map twice")
        else:
            self.key = event.value


def _build(loader: Any) -> Any:
    """Assemble the value from the parser's events, without recursion."""
    document: list[Any] = []
    stack, count = [_Unfinished(document, None, None, 0)], 0
    anchors: dict[str, tuple[Any, int]] = {}
    """Value and number of values of each anchor."""
    while loader.check_event():
        event = loader.get_event()
        begin, anchor = count, getattr(event, "anchor", None)
        count += 1
        if isinstance(event, yaml.CollectionStartEvent):
            _check_tag(event.tag)
            is_list = isinstance(event, yaml.SequenceStartEvent)
            stack.append(_Unfinished([] if is_list else {}, anchor, event.tag, begin))
            if len(stack) > MAX_DEPTH + 1:
                raise ValueError(f"lists and maps are more than {MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            begin, anchor = closed.begin, closed.anchor
            value = closed.value if closed.tag in _UNDERSTOOD else f"<{closed.tag}>"
        elif isinstance(event, yaml.ScalarEvent):
            value = _scalar(loader, event)
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in anchors:
                raise ValueError(f"the alias *{anchor:.100} is not of a value that is complete")
            value, size = anchors[anchor]
            count, anchor = begin + size, None
        else:
            continue
        if count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        if anchor is not None:
            anchors[anchor] = (value, count - begin)
        stack[-1].add(value, event)
    if len(document) > 1:
        raise ValueError("more than one document")
    return document[0] if document else None


def _check_tag(tag: str | None) -> None:
    """Raise ValueError for a tag of YAML's own that could change what a value means."""
    if tag in _UNDERSTOOD or tag is None:
        return
    name = tag.removeprefix(_STANDARD)
    if name != tag and not name.startswith("python/"):
        raise ValueError(f"the tag !!{name:.100} is not understood")


def _scalar(loader: Any, event: Any) -> Any:
    _check_tag(event.tag)
    if event.tag not in _UNDERSTOOD:
        return f"<{event.tag}>"
    if event.tag is not None or not event.implicit[0]:
        return event.value
    tag = loader.resolve(yaml.ScalarNode, event.value, (True, False))
    kind = tag.removeprefix(_STANDARD)
    if kind not in ("null", "bool", "int", "float"):
        return event.value
    if len(event.value) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS:,} digits")
    return getattr(loader, f"construct_yaml_{kind}")(yaml.ScalarNode(tag, event.value))
