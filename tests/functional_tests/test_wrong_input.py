"""Every command answers wrong input with one message on one screen, no traceback and no files.

The test covers every registered command: a new one without a row here fails.
"""

import json
import sys
from pathlib import Path

import pytest
from small_tokenizer import make_tokenizer
from typer.testing import CliRunner

from megatron_olmo_bridge.cli.app import app

SCREEN = 24
WIDTH = 80
WRONG: dict[str, list[tuple[str, str]]] = {
    "synth": [("olmo2-2b OUT", "'olmo2-2b' is not known"), ("olmo2-tiny OUT --dtype int4", "int4")],
    "import": [("EMPTY OUT", "EMPTY"), ("FILE OUT", "FILE"), ("EMPTY OUT --heads many", "--heads")],
    "export": [("EMPTY OUT", "EMPTY"), ("FILE OUT", "FILE")],
    "average": [("EMPTY EMPTY OUT", "EMPTY"), ("EMPTY EMPTY OUT --weights heavy", "heavy")],
    "verify": [("EMPTY", "EMPTY"), ("EMPTY FILE", "EMPTY"), ("absent", "absent"),
               ("EMPTY --fingerprint abc", "--fingerprint"), ("EMPTY --sample 3", "--against"),
               ("EMPTY --against FILE", "FILE"), ("EMPTY --against absent", "absent"),
               ("EMPTY --against EMPTY", "EMPTY"), ("EMPTY FILE --against FILE", "one checkpoint"),
               ("EMPTY --optimizer --against FILE", "weights alone")],
    "fingerprint": [("EMPTY", "EMPTY"), ("FILE", "FILE"), ("EMPTY --leaves FILE", "FILE"),
                    ("EMPTY --leaves absent/leaves.json", "absent")],
    "inspect": [("EMPTY", "EMPTY"), ("FILE", "FILE"), ("absent", "absent")],
    "models": [("olmo2", "unexpected extra argument")],
    "doctor": [("--fix", "No such option")],
    "compare": [("EMPTY EMPTY", "EMPTY"), ("EMPTY EMPTY --tp 0", "--tp")],
    "roundtrip": [("EMPTY", "EMPTY"), ("EMPTY --tokens 1", "--tokens")],
    "generate": [("EMPTY", "--prompt"), ("EMPTY --tokens a,b", "a,b"),
                 ("EMPTY --tokens 1", "EMPTY")],
    "prepare-data": [("absent.txt OUT --tokenizer EMPTY", "absent.txt"),
                     ("FILE OUT --tokenizer EMPTY", "FILE"), ("FILE OUT", "--tokenizer")],
    "recipes": [("--nothing", "No such option")],
    "train": [("absent.py", "absent.py"), ("FILE", "FILE"), ("FILE train.steps", "FILE")],
    "report": [("EMPTY", "EMPTY"), ("FILE", "FILE"), ("absent", "absent")],
}  # fmt: skip
"""Arguments of each command, and what the message must name."""
CASES = [(command, *case) for command, cases in WRONG.items() for case in cases]


def test_every_command_has_a_case() -> None:
    assert WRONG.keys() == {command.name for command in app.registered_commands}


@pytest.mark.parametrize(("command", "arguments", "names"), CASES)
def test_wrong_input_is_refused_on_one_screen(
    command: str, arguments: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is the same on the terminal and in the JSON."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("not what you think")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    words = [command, *arguments.split()]

    shown = CliRunner().invoke(app, words)
    scripted = CliRunner().invoke(app, [*words, "--json"])

    assert shown.exit_code == scripted.exit_code == 2
    assert shown.stdout == ""
    assert names in shown.stderr
    assert "Traceback" not in shown.stderr
    lines = shown.stderr.splitlines()
    assert sum(1 + (len(line) - 1) // WIDTH for line in lines) <= SCREEN
    envelope = json.loads(scripted.stdout)
    assert (envelope["command"], envelope["ok"], envelope["result"]) == (command, False, None)
    assert names in envelope["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "FILE"]
    assert list((tmp_path / "EMPTY").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such a file can't be made")
@pytest.mark.parametrize(
    "words",
    [
        ("synth", "olmo2-tiny", "OUT"),
        ("import", "HF", "OUT"),
        ("import", "HF", "OUT/below", "--dry-run"),
        ("export", "MEGATRON", "OUT"),
        ("average", "HF", "HF", "OUT"),
        ("prepare-data", "text.txt", "OUT", "--tokenizer", "tokenizer"),
        ("train", "olmo2_tiny", "checkpoint.save=OUT"),
        ("train", "olmo2_tiny", "export.hf=OUT"),
    ],
    ids=" ".join,
)
def test_an_output_name_that_is_not_utf8_is_refused(
    words: tuple[str, ...],
    single: Path,
    megatron: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """safetensors and torch can't open a file whose name is not UTF-8."""
    if words[0] == "train":
        pytest.importorskip("megatron.core")
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    given = {"HF": str(single), "MEGATRON": str(megatron)}
    done = CliRunner().invoke(app, [given.get(w, w.replace("OUT", "out\udcff")) for w in words])

    assert done.exit_code == 2
    assert "out" in done.stderr and "is not UTF-8" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
