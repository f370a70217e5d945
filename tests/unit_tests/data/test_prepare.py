"""prepare_data: what it writes, what it counts, what it refuses, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from small_tokenizer import EOS, make_tokenizer, texts
from transformers import AutoTokenizer

from megatron_olmo_bridge import __version__
from megatron_olmo_bridge.data import parts, prepare
from megatron_olmo_bridge.data.info import DataInfo, describe, read_info
from megatron_olmo_bridge.data.options import PrepareOptions, PrepareReporter
from megatron_olmo_bridge.data.prepare import prepare_data
from megatron_olmo_bridge.errors import BridgeError, FormatError, InputError, OutputError

Prepare = Callable[..., DataInfo]


@pytest.fixture
def prepared(tokenizer_folder: Path) -> Prepare:
    """prepare_data in this process, with the small tokenizer."""

    def run(inputs: list[Path] | Path, out: Path, **options: Any) -> DataInfo:
        files = inputs if isinstance(inputs, list) else [inputs]
        chosen = {"tokenizer": tokenizer_folder, "workers": 1} | options
        reporter = chosen.pop("reporter", None)
        return prepare_data(files, out, PrepareOptions(**chosen), reporter)

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_json_lines(tmp_path / "corpus.jsonl", texts(40))


def write_json_lines(path: Path, found: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in found))
    return path


def documents(out: Path) -> list[list[int]]:
    """Return the documents as stock megatron-core reads them."""
    stock = IndexedDataset(str(out))  # its arrays die with it
    return [d.tolist() for d in stock[:]]


def expected(folder: Path, found: list[str]) -> list[list[int]]:
    """Return the documents as transformers tokenizes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in found]
    return [[*one, tokenizer.eos_token_id] for one in ids]


def files_of(out: Path) -> dict[str, bytes]:
    return {s: Path(f"{out}{s}").read_bytes() for s in (".bin", ".idx", ".json")}


# ------------------------------------------------------------------------------- what it writes


def test_every_format_gives_the_same_tokens(
    prepared: Prepare, tokenizer_folder: Path, tmp_path: Path
) -> None:
    found = [t.replace("\n", " ").strip() + "." for t in texts(60)]
    lines = write_json_lines(tmp_path / "a.jsonl", found)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.read_bytes()))
    (tmp_path / "a.txt").write_text("\n".join(found))
    pq.write_table(pa.table({"text": found}), tmp_path / "a.parquet", row_group_size=9)
    tokens = expected(tokenizer_folder, found)
    np.array([t for one in tokens for t in one], "uint16").tofile(tmp_path / "a.npy")
    for path in sorted(tmp_path.glob("a.*")):
        info = prepared(path, tmp_path / "out", overwrite=True)
        assert documents(tmp_path / "out") == tokens, path
        assert (info.documents, info.tokens) == (60, sum(map(len, tokens)))


def test_the_files_are_those_of_megatrons_own_builder(
    prepared: Prepare, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    prepared(corpus, tmp_path / "out")
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=np.uint16)
    for ids in expected(tokenizer_folder, texts(40)):
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "stock.idx"))
    for suffix in (".bin", ".idx"):
        assert (
            Path(f"{tmp_path / 'out'}{suffix}").read_bytes()
            == (tmp_path / f"stock{suffix}").read_bytes()
        )


def test_the_record(
    prepared: Prepare, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    info = prepared(corpus, tmp_path / "folder" / "out.v1")
    tokens = [t for one in expected(tokenizer_folder, texts(40)) for t in one]
    digests = {"tokenizer_sha256": None, "plan": None, "input_state": None}
    assert dataclasses.replace(info, **digests) == DataInfo(  # type: ignore[arg-type]
        prefix=str(tmp_path / "folder" / "out.v1"),
        documents=40,
        tokens=len(tokens),
        dtype="uint16",
        tokenizer=str(tokenizer_folder),
        vocab_size=400,
        eos_id=0,
        max_token_id=max(tokens),
        inputs=[{"path": str(corpus), "bytes": corpus.stat().st_size}],
        version=__version__,
    )
    assert [len(getattr(info, name)) for name in digests] == [64, 64, 64]
    assert read_info(tmp_path / "folder" / "out.v1.bin") == info
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
        "out.v1.bin",
        "out.v1.idx",
        "out.v1.json",
    ]


def test_a_large_vocabulary_takes_int32(corpus: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "large")
    file = tokenizer / "tokenizer.json"
    value = json.loads(file.read_text())
    value["model"]["vocab"]["never"] = 70_000  # with a gap, so len(tokenizer) would be too small
    file.write_text(json.dumps(value))
    info = prepare_data([corpus], tmp_path / "out", PrepareOptions(tokenizer=tokenizer, workers=1))
    assert (info.dtype, info.vocab_size) == ("int32", 70_001)
    assert documents(tmp_path / "out") == expected(tokenizer, texts(40))


def test_files_keep_their_order_whatever_their_parts(
    prepared: Prepare, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["b", "a", "c", "d"]
    found = {name: texts(30, seed=i) for i, name in enumerate(names)}
    files = [write_json_lines(tmp_path / f"{n}.jsonl", found[n]) for n in names]
    want = expected(tokenizer_folder, [t for n in names for t in found[n]])
    outputs = []
    for size in (100, 5000, 1 << 20):
        monkeypatch.setattr(prepare, "LEAST_PART_BYTES", size)
        prepared(files, tmp_path / f"out{size}")
        assert documents(tmp_path / f"out{size}") == want
        outputs.append(files_of(tmp_path / f"out{size}"))
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_tokenizer_that_truncates_is_kept_from_it(corpus: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "cut")
    file = tokenizer / "tokenizer.json"
    value = json.loads(file.read_text())
    value["truncation"] = {
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    value["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_id": 0,
        "pad_to_multiple_of": None,
        "pad_type_id": 0,
        "pad_token": EOS,
    }
    file.write_text(json.dumps(value))
    prepare_data([corpus], tmp_path / "out", PrepareOptions(tokenizer=tokenizer, workers=1))
    assert documents(tmp_path / "out") == expected(tokenizer, texts(40))


def test_progress_adds_up(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    said: dict[str, list[int]] = {"tokens": [0]}

    class Recorder(PrepareReporter):
        def begin(self, what: str, total: int) -> None:
            self.now = said[what] = [total, 0]

        def advance(self, done: int) -> None:
            self.now[1] += done

        def tokens(self, count: int) -> None:
            said["tokens"].append(count)

    info = prepared(corpus, tmp_path / "out", reporter=Recorder())
    assert said["Tokenizing"] == [corpus.stat().st_size] * 2
    assert said["Joining"] == [info.tokens * 2] * 2
    assert said["tokens"][-1] == info.tokens


# ------------------------------------------------------------------------------- what it counts


def test_documents_without_text_are_counted(prepared: Prepare, tmp_path: Path) -> None:
    info = prepared(write_json_lines(tmp_path / "a.jsonl", ["", "a", "", "b"]), tmp_path / "out")
    assert (info.documents, info.empty_documents) == (2, 2)


def test_a_bad_line_stops_it_unless_they_are_skipped(
    prepared: Prepare, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with corpus.open("a") as file:
        file.write('{"text": 1}\n{"text"\n' + "[]\n" * 9)
    with pytest.raises(FormatError, match=r"corpus\.jsonl:41: .*pass --skip-bad-lines"):
        prepared(corpus, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]
    info = prepared(corpus, tmp_path / "out", skip_bad_lines=True)
    assert (info.documents, info.bad_lines) == (40, 11)
    assert len(info.first_bad_lines) == parts.BAD_LINES_NAMED
    assert info.first_bad_lines[0] == f"{corpus}:41: field 'text' is a number, not a text"
    assert documents(tmp_path / "out") == expected(tokenizer_folder, texts(40))


# ------------------------------------------------------------------------------ what it refuses


def refused(
    error: type[BridgeError], match: str, prepared: Prepare, *args: Any, **options: Any
) -> None:
    with pytest.raises(error, match=match) as caught:
        prepared(*args, **options)
    assert len(str(caught.value)) < 500


def test_inputs_that_cannot_be(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "a.csv").write_text("text\na\n")
    for name, match in (
        ("none.jsonl", "none.jsonl: no such file"),
        ("empty.jsonl", "empty.jsonl: is empty"),
        ("a.csv", r"a.csv: is of an unknown kind. Known are .jsonl"),
        ("", r"is a folder. Name the files"),
    ):
        refused(InputError, match, prepared, [corpus, tmp_path / name], out)
    no_documents = "no documents in the input: 0 bad lines, 0 documents without text"
    refused(InputError, no_documents, prepared, tmp_path / "blank.txt", out)
    refused(InputError, "no input files", prepared, [], out)
    assert not list(tmp_path.glob("out*"))


def test_options_that_cannot_be(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, match in (
        ({"txt_documents": "paragraph"}, "txt_documents 'paragraph': must be one of line, file"),
        ({"token_dtype": "int32"}, "token_dtype 'int32': must be one of uint8, uint16"),
        ({"text_field": "body"}, "corpus.jsonl:1: no field 'body'; its fields: text"),
    ):
        refused(BridgeError, match, prepared, corpus, out, **options)
    assert not list(tmp_path.glob("out*"))


def test_tokenizers_that_cannot_be(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for tokenizer, match in (
        (tmp_path / "missing", "missing: no such folder. --tokenizer takes"),
        (tmp_path / "none", "none: no tokenizer could be loaded: "),
        (corpus, "corpus.jsonl: no such folder"),
        (make_tokenizer(tmp_path / "no-eos", eos=None), "no-eos: the tokenizer has no eos token"),
    ):
        refused(InputError, match, prepared, corpus, tmp_path / "out", tokenizer=tokenizer)


def test_outputs_that_cannot_be(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    refused(InputError, "is a folder. Name a prefix in it", prepared, corpus, tmp_path)
    refused(InputError, "has the name of an input", prepared, corpus, tmp_path / "b.jsonl")
    same = write_json_lines(tmp_path / "same.json", ["a"])
    refused(InputError, "both input and output", prepared, same, tmp_path / "same", overwrite=True)
    refused(OutputError, "can't write here: Not a directory", prepared, corpus, same / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    refused(OutputError, "is in the way", prepared, corpus, tmp_path / "out", overwrite=True)


def test_what_exists_is_replaced_only_if_asked(
    prepared: Prepare, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepared(corpus, out)
    other = write_json_lines(tmp_path / "other.jsonl", ["one", "two"])
    for options in ({}, {"resume": True}):
        refused(OutputError, "exists already. Pass --overwrite", prepared, other, out, **options)
    assert read_info(out).documents == 40
    assert prepared(other, out, overwrite=True).documents == 2
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]


# ------------------------------------------------------------------------------- how it goes on


class StoppedError(Exception):
    """In place of whatever ends a run early."""


def stop(*_: object) -> None:
    raise StoppedError


@pytest.fixture
def interrupted(
    prepared: Prepare, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run in parts that was stopped after some of them."""
    monkeypatch.setattr(prepare, "LEAST_PART_BYTES", 1000)
    write = parts.PartWriter.write

    def write_three(
        self: parts.PartWriter, part: parts.Part, progress: parts.Progress
    ) -> parts.Counts:
        if part.number == 3:
            stop()
        return write(self, part, progress)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(parts.PartWriter, "write", write_three)
        prepared(corpus, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["prepare.json", "part-000000.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}x", '{"plan": 3}', '{"replace": false}'])
def test_an_interrupted_run_whose_records_are_damaged(
    prepared: Prepare, corpus: Path, interrupted: Path, name: str, text: str
) -> None:
    (interrupted.with_name("out.partial") / name).write_text(text)
    refused(FormatError, name, prepared, corpus, interrupted, resume=True)


def test_an_interrupted_run_is_continued(
    prepared: Prepare, corpus: Path, interrupted: Path, tmp_path: Path
) -> None:
    assert [p.name for p in tmp_path.glob("out*")] == ["out.partial"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("part-*.bin")}
    assert len(before) == 3
    with pytest.raises(InputError, match=r"out.partial: an interrupted prepare-data"):
        read_info(interrupted)
    refused(
        OutputError, "Pass --resume to continue it, or --overwrite", prepared, corpus, interrupted
    )
    written: list[Path] = []

    class Watch(PrepareReporter):
        def end(self) -> None:
            written.extend(p for p, at in before.items() if p.stat().st_mtime_ns != at)

    prepared(corpus, interrupted, resume=True, reporter=Watch())
    assert not written
    prepared(corpus, tmp_path / "whole")
    assert files_of(interrupted) == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("fate", ["damaged", "cut", "gone"])
def test_a_finished_part_that_is_not_as_it_was_is_written_again(
    prepared: Prepare, corpus: Path, interrupted: Path, tmp_path: Path, suffix: str, fate: str
) -> None:
    part = tmp_path / f"out.partial/part-000001{suffix}"
    data = part.read_bytes()
    if fate == "gone":
        part.unlink()
    else:
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if fate == "damaged" else data[:-1])
    prepared(corpus, interrupted, resume=True)
    prepared(corpus, tmp_path / "whole")
    assert files_of(interrupted) == files_of(tmp_path / "whole")


def test_a_finished_run_of_other_inputs_is_not_taken_for_this_one(
    prepared: Prepare, corpus: Path, tmp_path: Path
) -> None:
    prepared(corpus, tmp_path / "out")
    corpus.write_text(corpus.read_text().swapcase().replace('"TEXT"', '"text"'))  # of the same size
    refused(OutputError, "Pass --overwrite", prepared, corpus, tmp_path / "out", resume=True)


def test_a_finished_run_is_not_done_again(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    info = prepared(corpus, tmp_path / "out", resume=True)  # afresh
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert prepared(corpus, tmp_path / "out", resume=True) == info
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before
    assert not (tmp_path / "out.partial").exists()


def test_another_plan_is_not_continued(
    prepared: Prepare, corpus: Path, interrupted: Path, tmp_path: Path
) -> None:
    other = make_tokenizer(tmp_path / "other", vocab_size=300)
    for what, options in (
        ("tokenizer", {"tokenizer": other}),
        ("txt documents", {"txt_documents": "file"}),
        ("token dtype", {"token_dtype": "uint32"}),
    ):
        refused(
            OutputError,
            f"begun with another {what}",
            prepared,
            corpus,
            interrupted,
            resume=True,
            **options,
        )
    os.utime(corpus, (1, 1))
    refused(OutputError, "another input state", prepared, corpus, interrupted, resume=True)
    corpus.write_text(corpus.read_text() + '{"text": "more"}\n')
    refused(OutputError, "another inputs", prepared, corpus, interrupted, resume=True)
    assert prepared(corpus, interrupted, overwrite=True).documents == 41


def test_bad_lines_may_be_skipped_on_resuming_but_not_forgotten(
    prepared: Prepare, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "LEAST_PART_BYTES", 1000)
    with corpus.open("a") as file:
        file.write("{}\n")
    out = tmp_path / "out"
    refused(
        FormatError, "corpus.jsonl:41: no field 'text'; its fields: none", prepared, corpus, out
    )
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(prepare.Partial, "commit", stop)
        prepared(corpus, out, resume=True, skip_bad_lines=True)
    refused(FormatError, "corpus.jsonl:41", prepared, corpus, out, resume=True)
    info = prepared(corpus, out, resume=True, skip_bad_lines=True)
    assert (info.documents, info.bad_lines) == (40, 1)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_stopped_while_files_get_their_names(
    prepared: Prepare,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    renames: int,
    replaced: bool,
) -> None:
    out = tmp_path / "out"
    want = prepared(corpus, tmp_path / "whole")
    if replaced:
        prepared(write_json_lines(tmp_path / "old.jsonl", ["old"]), out)
    rename, done = Path.rename, []

    def rename_some(self: Path, target: Path) -> Path:
        if target.stem == "out":
            if len(done) == renames:
                stop()
            done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_some)
        if renames < 3:
            with pytest.raises(StoppedError):
                prepared(corpus, out, overwrite=replaced)
            assert not (out.with_suffix(".idx").exists() and out.with_suffix(".json").exists())
        else:
            prepared(corpus, out, overwrite=replaced)
    info = prepared(corpus, out, resume=True)
    assert dataclasses.replace(info, prefix="") == dataclasses.replace(want, prefix="")
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_two_runs_do_not_share_an_output(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    class Second(PrepareReporter):
        def begin(self, what: str, total: int) -> None:
            with pytest.raises(OutputError, match="another olmo-bridge is writing here right now"):
                prepared(corpus, tmp_path / "out", overwrite=True)

    assert prepared(corpus, tmp_path / "out", reporter=Second()).documents == 40


# ---------------------------------------------------------------------------------- looking at it


def test_a_dataset_of_other_tools(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=np.int32)
    for length in (3, 1, 8):
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(tmp_path / "stock.idx"))
    info = read_info(tmp_path / "stock")
    assert info == DataInfo(prefix=str(tmp_path / "stock"), documents=3, tokens=12, dtype="int32")
    found = describe(tmp_path / "stock.idx")
    assert (found.mean, found.median, found.longest) == (4.0, 3.0, 8)
    assert found.first_tokens == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert found.first_text is None


def test_a_description_shows_how_the_text_begins(
    prepared: Prepare, corpus: Path, tmp_path: Path
) -> None:
    prepared(corpus, tmp_path / "out")
    found = describe(tmp_path / "out")
    assert found.nbytes == sum(len(data) for data in files_of(tmp_path / "out").values())
    text = EOS.join(texts(40))
    assert found.first_text is not None
    assert text.startswith(found.first_text.rstrip("\ufffd"))


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": 3},
        {"eos_id": "1"},
        {"bad_lines": None},
        {"first_bad_lines": "a"},
        {"inputs": [1]},
        {"inputs": [{"path": "a", "bytes": "1"}]},
    ],
)
def test_a_record_of_other_types(
    prepared: Prepare, corpus: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    prepared(corpus, tmp_path / "out")
    record = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").write_text(json.dumps(record | change))
    with pytest.raises(FormatError, match=r"out\.json: not the record of prepare-data"):
        read_info(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", [b"{}", b"", b"\xff"])
def test_a_description_without_a_sound_tokenizer(
    prepared: Prepare, corpus: Path, tmp_path: Path, tokenizer: bytes
) -> None:
    prepared(corpus, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    record = json.loads((tmp_path / "out.json").read_text()) | {"tokenizer": str(tmp_path)}
    (tmp_path / "out.json").write_text(json.dumps(record))
    assert describe(tmp_path / "out").first_text is None


def test_a_record_of_another_dataset(prepared: Prepare, corpus: Path, tmp_path: Path) -> None:
    prepared(corpus, tmp_path / "a")
    prepared(write_json_lines(tmp_path / "in.jsonl", ["a"]), tmp_path / "b")
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(FormatError, match=r"b\.json: does not match the \.bin and"):
        read_info(tmp_path / "b")
    for text in ("{", "[]", '{"documents": 3}', '{"what": 3}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(FormatError, match=r"b\.json: not the record of prepare-data"):
            read_info(tmp_path / "b")
