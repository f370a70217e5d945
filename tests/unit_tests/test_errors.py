"""How messages show what a file says: escaped, bounded, and never by running to its end."""

from typing import Any

import pytest

from megatron_olmo_bridge.errors import MOST_CHARACTERS, MOST_LINES, escape, fit_screen, quote


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (0.5, "0.5"),
        (-7, "-7"),
        (2**127, str(2**127)),
        (10**100, "an integer of 333 bits"),
        ("relu", "'relu'"),
        ("a\x1b[2J\u202eb", r"'a\x1b[2J\u202eb'"),
        ("x" * 81, f"'{'x' * 80}'..."),
        (b"x" * 81, f"b'{'x' * 80}'..."),
        ([], "[]"),
        ((4096,), "(4096,)"),
        ((4096, 0), "(4096, 0)"),
        ([1] * 9, "[1, 1, 1, 1, 1, 1, 1, 1, ...]"),
        ({"type": "yarn", "factor": 8.0}, "{'type': 'yarn', 'factor': 8.0}"),
        (dict.fromkeys(range(9)), "{0: None, 1: None, 2: None, 3: None, 4: None, 5: None, "
         "6: None, 7: None, ...}"),
        ([[[1]]], "[[<list>]]"),
        (object(), "<object>"),
        (int, "<int>"),
        (len, "<len>"),
    ],
)  # fmt: skip
def test_a_value_in_a_message(value: Any, text: str) -> None:
    assert quote(value) == text


def test_a_value_without_end_in_a_message() -> None:
    pairs: Any = None
    for _ in range(60):  # 2 ** 60 times None
        pairs = (pairs, pairs)
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    itself: list[Any] = []
    itself.append(itself)
    assert quote(pairs) == "((<tuple>, <tuple>), (<tuple>, <tuple>))"
    assert quote(10**5000) == "an integer of 16610 bits"  # str() refuses it
    assert quote(deep) == quote(itself) == "[[<list>]]"


def test_control_characters_are_escaped() -> None:
    assert escape("näme \N{SNOWMAN}") == "näme \N{SNOWMAN}"
    assert escape("\x1b]0;x\x07\x9b\r\n\u202e\ud800") == r"\x1b]0;x\x07\x9b\r\n\u202e\ud800"
    assert escape("a\n\tb", keep="\n\t") == "a\n\tb"


def test_a_message_is_at_most_a_screen() -> None:
    assert fit_screen("one\n  two\x1b") == "one\n  two\\x1b"
    long = fit_screen("x" * (MOST_CHARACTERS + 1))
    assert long == "x" * MOST_CHARACTERS + "\n(the rest of this message is left out)"
    high = fit_screen("x\n" * MOST_LINES + "y")
    assert high == "x\n" * MOST_LINES + "(the rest of this message is left out)"
    assert fit_screen("x\n" * (MOST_LINES - 1) + "y") == "x\n" * (MOST_LINES - 1) + "y"
