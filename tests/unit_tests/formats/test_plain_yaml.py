"""YAML as plain data: what real writers write is read, everything clever is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.files import MAX_DEPTH, YAML_LIMIT
from megatron_olmo_bridge.formats.plain_yaml import read_yaml


def read(folder: Path, text: str) -> Any:
    (folder / "f.yaml").write_text(text)
    return read_yaml(folder / "f.yaml")


def test_what_a_safe_dump_wrote(tmp_path: Path) -> None:
    value = {
        "none": None,
        "flags": [True, False],
        "whole": [0, -3, 10**20],
        "eps": 1e-06,
        "infinite": math.inf,
        "empty": [[], {}, ""],
        "text": ["1", "null", "yes", "a: b", "\u00e4"],
        "long": "word " * 40,
        "nested": {"a": {"b": [{"c": 1}]}},
    }
    assert read(tmp_path, yaml.safe_dump(value)) == value


@pytest.mark.parametrize(
    "text", ["1", "0x1F", "017", "1_000", "1:30", "1.5", "1e3", "1.0e+3", ".nan", "yes", "~", "''"]
)
def test_scalars_have_the_types_of_the_safe_loader(tmp_path: Path, text: str) -> None:
    assert repr(read(tmp_path, text)) == repr(yaml.safe_load(text))


def test_an_empty_file(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing") is None


def test_dates_and_keys_are_strings(tmp_path: Path) -> None:
    assert read(tmp_path, "{1: 2001-12-14, yes: b}") == {"1": "2001-12-14", "yes": "b"}


def test_what_a_programs_tag_builds_is_named_only(tmp_path: Path) -> None:
    text = "a: !!python/object/apply:os.system ['false']\nb: !mine {c: 1}\nc: !!python/name:d ''\n"
    assert read(tmp_path, text) == {
        "a": "<tag:yaml.org,2002:python/object/apply:os.system>",
        "b": "<!mine>",
        "c": "<tag:yaml.org,2002:python/name:d>",
    }


def test_an_alias_repeats_what_its_anchor_has(tmp_path: Path) -> None:
    dtype = {"_target_": "torch.bfloat16", "_call_": False}
    value = {"params_dtype": dtype, "pipeline_dtype": dtype}
    text = yaml.safe_dump(value)
    assert "*id001" in text
    assert read(tmp_path, text) == value


LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("!!timestamp x", "the tag !!timestamp is not understood"),
        ("!!bool x", "the tag !!bool"),
        ("!!int ''", "the tag !!int"),
        ("!!set {a}", "the tag !!set"),
        ("!!omap [a: 1]", "the tag !!omap"),
        ("!!binary =", "the tag !!binary"),
        ("&a [*a]", r"the alias \*a is not of a value that is complete"),
        ("*a", "alias"),
        ("a: &a {b: 1}\nc: {<<: *a}", "a key that is"),
        ("{[1]: 2}", "a key that is"),
        ("{a: 1, a: 2}", "'a' stands in a map twice"),
        ("a: 1\n---\nb: 2", "document"),
        ("a: b: c", r"\(line 1\)"),
        ("a:\n  - ]", r"\(line 2\)"),
        ("a: \0", "not sound YAML"),
        (r'"\ud800"', "not sound YAML"),
        ("0b_", "invalid literal"),
        ("1" * 1001, "a number of more than 1,000 digits"),
        ("1" + ":59" * 330 + ".5", "not sound YAML"),
        ("[" * 3000, "deep|nesting"),
        ("[" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
        (LAUGHS, "more than 100,000 values"),
        (CHAIN, f"more than {MAX_DEPTH} deep"),
        (f"[{'a, ' * 100_001}]", "more than 100,000 values"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'f.yaml'}: not sound YAML: ")
    assert "\n" not in str(caught.value)


def test_a_file_above_the_limit(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="bytes; a file of this kind is read up to"):
        read(tmp_path, " " * (YAML_LIMIT + 1))
