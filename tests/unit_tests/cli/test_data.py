"""prepare-data, and inspect of what it makes, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tokenizer import make_tokenizer, texts
from typer.testing import CliRunner, Result

from megatron_olmo_bridge.cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a tokenizer, and data prepared with them."""
    folder = tmp_path_factory.mktemp("data")
    make_tokenizer(folder / "tokenizer")
    lines = [json.dumps({"body": text}) for text in ["", *texts(40)]]
    (folder / "corpus.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    done = prepare(folder, "train", "--skip-bad-lines")
    assert done.exit_code == 0, done.output
    (folder / "said").write_text(done.stdout)
    return folder


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def prepare(folder: Path, out: str, *options: str) -> Result:
    return run(
        "prepare-data",
        folder / "corpus.jsonl",
        folder / out,
        "--tokenizer",
        folder / "tokenizer",
        "--text-field",
        "body",
        "-j",
        1,
        *options,
    )


def test_the_summary_names_documents_and_tokens(folder: Path) -> None:
    lines = (folder / "said").read_text().splitlines()
    assert lines[0].startswith(f"{folder / 'train'}: 40 documents, ")
    assert "tokens (uint16) in " in lines[0]
    assert lines[0].endswith(" tokens/s)")
    assert lines[1:] == [
        "Left out: 1 documents without text.",
        "Left out: 1 bad lines. The first:",
        f"  {folder / 'corpus.jsonl'}:42: broken JSON: Expecting property name enclosed in double "
        "quotes, at column 2",
        f"Look at it:  olmo-bridge inspect {folder / 'train'}",
        f"Train on it: data.path={folder / 'train'}",
    ]


def test_json_and_quiet(folder: Path) -> None:
    done = prepare(folder, "scripted", "--skip-bad-lines", "--json")
    said = json.loads(done.stdout)["result"]
    assert (said["documents"], said["bad_lines"], said["vocab_size"]) == (40, 1, 400)
    assert said["seconds"] > 0
    assert prepare(folder, "silent", "--skip-bad-lines", "--quiet").output == ""


def test_a_bad_line_is_refused(folder: Path) -> None:
    done = prepare(folder, "strict")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"olmo-bridge: {folder / 'corpus.jsonl'}:42: broken JSON")
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("strict*"))


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_inspect_prints_a_summary(folder: Path, suffix: str) -> None:
    done = run("inspect", f"{folder / 'train'}{suffix}")
    assert done.exit_code == 0
    for words in (
        "Megatron indexed dataset",
        "documents 40",
        "dtype uint16",
        "vocabulary 400, largest",
        "1 bad lines, 1 documents without text",
        "eos 0",
        f"Bad line: {folder / 'corpus.jsonl'}:42",
        str(folder / "tokenizer"),
    ):
        assert words in " ".join(done.stdout.split()), words
    line = next(li for li in done.stdout.splitlines() if li.startswith("which is"))
    assert texts(1)[0][:20] in line.encode().decode("unicode_escape", "ignore") or (
        repr(texts(1)[0])[:20] in line
    )


def test_inspect_as_json(folder: Path) -> None:
    said = json.loads(run("inspect", folder / "train", "--json").stdout)["result"]
    assert said["kind"] == "Megatron indexed dataset"
    assert said["info"]["documents"] == 40
    assert len(said["first_tokens"]) == 32
    assert run("inspect", folder / "train", "--quiet").output == ""


def test_inspect_refuses_damaged_data(folder: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"cut{suffix}").write_bytes(Path(f"{folder / 'train'}{suffix}").read_bytes())
    with (tmp_path / "cut.bin").open("r+b") as file:
        file.truncate(10)
    done = run("inspect", tmp_path / "cut")
    assert done.exit_code == 2
    assert "cut.bin: cut short: 10 bytes" in done.stderr
    done = run("inspect", tmp_path / "none.idx")
    assert (done.exit_code, "none.idx: no such file" in done.stderr) == (2, True)


def test_a_dry_run_checks_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    planned = json.loads(prepare(folder, "planned", "--dry-run", "--json").stdout)["result"]
    assert (planned["prefix"], planned["vocab_size"]) == (str(folder / "planned"), 400)
    assert planned["bytes_read"] == (folder / "corpus.jsonl").stat().st_size
    refused, real = prepare(folder, "train", "--dry-run"), prepare(folder, "train")
    assert "exists already. Pass --overwrite" in refused.stderr
    assert (refused.exit_code, refused.stderr) == (real.exit_code, real.stderr)
    absent = run(
        "prepare-data",
        folder / "absent.txt",
        folder / "x",
        "--tokenizer",
        folder / "tokenizer",
        "--dry-run",
    )
    assert (absent.exit_code, "absent.txt: no such file" in absent.stderr) == (2, True)
    assert sorted(folder.rglob("*")) == before
