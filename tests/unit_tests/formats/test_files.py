"""Small files: regular ones only, up to a limit, and as JSON within depth and number."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.files import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_VALUES,
    open_regular,
    parse_json,
    read_json,
    read_small,
)


def test_reads_a_file_of_just_the_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert read_small(tmp_path / "f", 3) == b"abc"


def test_a_larger_file_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(5 << 30)  # sparse
    with pytest.raises(FormatError, match=r"f: has 5,368,709,120 bytes; .* read up to 1,000"):
        read_small(tmp_path / "f", 1000)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "is a named pipe"),
        (Path.mkdir, "is a folder"),
        (a_socket, "is a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    ],
)
def test_what_is_not_a_regular_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    make(tmp_path / "f")
    with pytest.raises(FormatError, match=f"f: {says}, not a regular file"):
        open_regular(tmp_path / "f")


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "f").symlink_to("f")
    with pytest.raises(InputError, match="f: can't be opened: Too many levels of symbolic links"):
        read_small(tmp_path / "f", 10)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"a\xff")
    file.touch()
    with pytest.raises(FormatError, match=r"its name, .* is not UTF-8"):
        read_small(file, 10)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.mkfifo(tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    read_small(tmp_path / "f", 10)
    with pytest.raises(FormatError):
        read_small(tmp_path / "pipe", 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_json_as_it_is_written(tmp_path: Path) -> None:
    value = {"a": [1, -2.5, None, True, "\u00e4", "\U0001f600"], "b": {"c": float("inf")}}
    (tmp_path / "f").write_text(json.dumps(value))
    assert read_json(tmp_path / "f") == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "can't decode"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' stands in it twice"),
        (rb'["\ud800"]', "half a surrogate pair"),
        (rb'{"a\udfff": 1}', "half a surrogate pair"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
        (b"[" * 100_000, "recursion"),
        (b"1" * (MAX_DIGITS + 1), "a number of more than 1,000 digits"),
        (b"1" * 1_000_000, "a number of more than 1,000 digits"),
        (b"[" + b"0," * MAX_VALUES + b"0]", "more than 2,000,000 values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_json_that_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        parse_json(text, "f.json")
    assert str(caught.value).startswith("f.json: not sound JSON: ")


def test_json_of_the_greatest_depth() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "f")


def test_a_key_that_stands_twice_is_found_in_one_pass() -> None:
    keys = ",".join(f'"k{i}":0' for i in range(150_000))
    with pytest.raises(FormatError, match="'z' stands in it twice"):
        parse_json(f'{{{keys},"z":0,"z":0}}'.encode(), "f")
