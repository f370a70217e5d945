"""Hypothesis strategies that damage a valid file, one per kind of file."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import yaml
from hypothesis import strategies as st

Bytes = st.SearchStrategy[bytes]

NUMBERS = [
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "0.5",
    "1.0",
    "1e-400",
    "1e400",
    "1e308",
    "NaN",
    "Infinity",
    "-Infinity",
    str(2**31),
    str(2**32 + 1),
    str(2**63),
    str(-(2**63) - 1),
    str(2**64),
    "9" * 400,
    "9" * 5000,
]
TEXTS = [
    "",
    "..",
    "/etc/passwd",
    "a/b",
    "\x00",
    "\x1b[31m\r\n\u202e",
    "\ufeff",
    "x" * 100_000,
    "float32",
    "bfloat16",
    "BF16",
    "F64",
    "model.safetensors",
    "1",
    "true",
    "null",
]
JSON_VALUES = [
    *NUMBERS,
    *map(json.dumps, TEXTS),
    '"\\ud800"',
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "[null]",
    "[[[]]]",
    '{"a": 1}',
    "[" * 70 + "]" * 70,
    "[" * 20_000 + "]" * 20_000,
    "[" * 20_000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    "[" + "0," * 50_000 + "0]",
]
YAML_VALUES = [
    *JSON_VALUES,
    "~",
    "yes",
    "0x10",
    "0o17",
    "1_000",
    "1:30:00",
    ".nan",
    "-.inf",
    "2024-01-01",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!python/object/apply:os.getcwd []",
    "!!python/name:os.system",
    "!!float 1",
    "!!int 7",
    "!!str 1",
    "!!null x",
    "!unknown x",
    "*a",
    "&a [*a]",
    "[&b 1, *b, *b]",
    "{<<: {a: 1}}",
    "{<<: 3}",
    "{? [a] : b}",
    "{a: 1, a: 2}",
    "|\n  text",
    "%",
    "@",
    "{",
    "]",
    "'",
    "\t",
]
OPCODES = [
    b"N",
    b"0",
    b"1",
    b"2",
    b"(",
    b")",
    b"]",
    b"}",
    b"t",
    b"u",
    b"e",
    b"s",
    b"a",
    b"b",
    b"R",
    b"\x81",
    b".",
    b"\x85",
    b"Q",
    b"2" * 50_000,
    b"(" * 50_000,
    b"]" * 50_000,
    b"(" * 2000 + b"t" * 2000,
    b"\x85" * 20_000,
    b"\x8f(\x90",
    b"r\xff\xff\xff\x7f",
    b"q\x05",
    b"j\xff\xff\xff\x7f",
    b"h\x00",
    b"X\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 7 + b"\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"\x95" + b"\xff" * 8,
    b"cos\nsystem\n(X\x04\x00\x00\x00truetR",
    b"c__builtin__\neval\n",
    b"cbuiltins\ngetattr\n",
    b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR",
    b"cbuiltins\nset\n)R",
    b"ctorch\nSize\n(K\x03tR",
    b"cbuiltins\nslice\n(NNNtR",
    b"cbuiltins\ncomplex\n)R",
    b"ccollections\nOrderedDict\n)R",
    b"J\xff\xff\xff\x7f",
    b"K\x00",
    b"M\xff\xff",
    b"\x8a\x09" + b"\xff" * 8 + b"\x00",
    b"I01\n",
    b"L99999999999999999999L\n",
    b"F1e999\n",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\x8a\x00",
    b"X\x03\x00\x00\x00\xed\xa0\x80",
    b"X\x05\x00\x00\x00\x1b[31m",
    b"\x82\x01",
    b"\x97\x98",
    b"\x80\x05",
    b"\x80\x63",
    b"((lp0\nh\x00a",
    b"\x94" * 1000,
]


@st.composite
def changed_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """Flip bits, cut, insert, splice and overwrite, once to four times."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        # Half of the places are near the beginning, where headers are.
        end = len(data) if draw(st.booleans()) else min(len(data), 64)
        at = draw(st.integers(0, end))
        match draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat", "number"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(data):
                data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, *b'"{}[],:-0']))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 256))]
            case "number":
                value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1]))
                data[at : at + 8] = struct.pack("<Q", value)
    return bytes(data)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path, a tuple of keys, of every value in nested lists and maps."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from _places(inner, (*path, key))


@st.composite
def _changed_tree(draw: st.DrawFn, value: Any, raw: list[str]) -> tuple[Any, dict[str, str]]:
    """Change a tree; also return the unquoted texts that stand for placeholders in it."""
    standing: dict[str, str] = {}
    value = json.loads(json.dumps(value))
    for number in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        parent = value
        for key in path:
            parent = parent[key]
        match draw(st.sampled_from(["put", "put", "put", "delete", "copy", "rename", "reorder"])):
            case "put":
                mark = f"@@{number}@@"
                standing[mark] = draw(st.sampled_from(raw))
                parent[last] = mark
            case "delete":
                del parent[last]
            case "copy":
                other: Any = value
                for key in draw(st.sampled_from(places)):
                    other = other[key]
                parent[last] = copy.deepcopy(other)
            case "rename" if isinstance(parent, dict):
                name = draw(st.sampled_from([*TEXTS, *map(str, places[0]), "rope_theta"]))
                parent[name] = parent.pop(last)
            case "reorder" if isinstance(parent, dict):
                parent[last] = parent.pop(last)
    return value, standing


@st.composite
def _changed_text(draw: st.DrawFn, value: Any, *, is_yaml: bool) -> bytes:
    value, standing = draw(_changed_tree(value, YAML_VALUES if is_yaml else JSON_VALUES))
    text = yaml.safe_dump(value, sort_keys=False) if is_yaml else json.dumps(value)
    for mark, raw in standing.items():
        text = text.replace(f"'{mark}'" if is_yaml else f'"{mark}"', raw)
    if not is_yaml and value and draw(st.integers(0, 9)) == 0:  # a key twice
        key = draw(st.sampled_from(sorted(map(str, value))))
        text = f"{{{json.dumps(key)}: {draw(st.sampled_from(JSON_VALUES))}, {text[1:]}"
    return text.encode("utf-8", "surrogatepass")


def changed_json(sound: bytes) -> Bytes:
    """Change a JSON object by its values and keys, or by its bytes."""
    by_value = _changed_text(json.loads(sound), is_yaml=False)
    return by_value | by_value | by_value | changed_bytes(sound)


def changed_yaml(sound: bytes) -> Bytes:
    """Change a YAML map by its values and keys, or by its bytes."""
    by_value = _changed_text(yaml.safe_load(sound), is_yaml=True)
    return by_value | by_value | by_value | changed_bytes(sound)


def changed_safetensors(sound: bytes) -> Bytes:
    """Change the header of a safetensors file as JSON, or the file by its bytes."""
    (length,) = struct.unpack("<Q", sound[:8])
    rest = sound[8 + length :]
    headers = changed_json(sound[8 : 8 + length])
    return headers.map(lambda header: struct.pack("<Q", len(header)) + header + rest) | (
        changed_bytes(sound)
    )


@st.composite
def _changed_opcodes(draw: st.DrawFn, sound: bytes) -> bytes:
    starts = [position for _, _, position in pickletools.genops(sound)]
    opcodes = [sound[a:b] for a, b in pairwise([*starts, len(sound)])]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(opcodes) - 1))
        match draw(st.sampled_from(["insert", "put", "delete", "repeat", "swap", "argument"])):
            case "insert":
                opcodes.insert(at, draw(st.sampled_from(OPCODES)))
            case "put":
                opcodes[at] = draw(st.sampled_from(OPCODES))
            case "delete" if len(opcodes) > 1:
                del opcodes[at]
            case "repeat":
                opcodes[at:at] = opcodes[at : at + draw(st.integers(1, 30))]
            case "swap":
                other = draw(st.integers(0, len(opcodes) - 1))
                opcodes[at], opcodes[other] = opcodes[other], opcodes[at]
            case "argument":  # of another opcode of the same kind: a shape for an offset
                same = [o for o in opcodes if o[:1] == opcodes[at][:1]]
                opcodes[at] = draw(st.sampled_from(same))
    return b"".join(opcodes)


def changed_pickle(sound: bytes) -> Bytes:
    """Change a pickle by its opcodes, or by its bytes."""
    return _changed_opcodes(sound) | _changed_opcodes(sound) | changed_bytes(sound)


def changed_archive(sound: bytes) -> Bytes:
    """Change the pickle in an archive of torch.save, or the archive by its bytes."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in records if name.endswith("/data.pkl"))

    def packed(changed: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, data in records.items():
                archive.writestr(name, changed if name == pickled else data)
        return out.getvalue()

    return changed_pickle(records[pickled]).map(packed) | changed_bytes(sound)


@st.composite
def changed_lines(draw: st.DrawFn, sound: bytes) -> bytes:
    """Change one line of JSON Lines as JSON, or the file by its bytes."""
    if draw(st.booleans()):
        return draw(changed_bytes(sound))
    lines = sound.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(changed_json(lines[at]))
    return draw(st.sampled_from([b"\n", b"\r\n"])).join(lines)
