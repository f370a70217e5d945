"""Documents out of files: every format, cut anywhere, and what can't be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small_tokenizer import texts

from megatron_olmo_bridge.data import documents
from megatron_olmo_bridge.data.documents import BadLine, Kind, Span, TextOptions
from megatron_olmo_bridge.errors import FormatError, InputError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def read(
    path: Path, limit: int = 1 << 20, **options: str
) -> tuple[list[str], list[BadLine], list[Span]]:
    """All texts and bad lines of a file that is divided into spans of this many bytes."""
    chosen = TextOptions(**options)
    spans = documents.text_spans(str(path), limit, chosen)
    batches = [batch for span in spans for batch in documents.read_texts(span, chosen)]
    assert sum(batch.nbytes for batch in batches) == path.stat().st_size
    return [t for b in batches for t in b.texts], [bad for b in batches for bad in b.bad], spans


def json_lines(found: list[str], end: str = "\n") -> bytes:
    return "".join(
        json.dumps({"id": 1, "text": t}, ensure_ascii=False) + end for t in found
    ).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    found = texts(50)
    compress = COMPRESS.get(path.suffix, bytes)
    path.write_bytes(compress(json_lines(found[:25])) + compress(json_lines(found[25:])))
    assert read(path)[0] == found


@pytest.mark.parametrize("limit", [1, 7, 100, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_a_line_belongs_to_one_span_wherever_the_file_is_cut(
    tmp_path: Path, limit: int, end: str
) -> None:
    path = tmp_path / "a.jsonl"
    found = texts(30, words=8)
    path.write_bytes(json_lines(found, end).rstrip() if limit == 7 else json_lines(found, end))
    got, bad, spans = read(path, limit)
    assert got == found
    assert not bad
    assert len(spans) == -(-path.stat().st_size // limit)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_txt_by_line_and_by_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    text = "\ufeffone \r\n\n  \n  two\nthrée"
    path.write_bytes(COMPRESS[suffix](text.encode()))
    assert read(path)[0] == ["one ", "  two", "thrée"]
    assert read(path, txt_documents="file")[0] == [text[1:]]
    if not suffix:
        assert read(path, 5)[0] == ["one ", "  two", "thrée"]
        assert len(read(path, 5, txt_documents="file")[2]) == 1


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    found = [*texts(700), ""]
    table = pa.table({"id": range(701), "body": pa.array(found).cast(kind)})
    pq.write_table(table, path, row_group_size=300)
    got, bad, spans = read(path, text_field="body")
    assert (got, bad) == (found, [])
    assert [(s.begin, s.end) for s in spans] == [(0, 1), (1, 2), (2, 3)]


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "TEXTS_AT_ONCE", 50)
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n" * 20)
    (span,) = documents.text_spans(str(path), 1 << 20, TextOptions())
    batches = list(documents.read_texts(span, TextOptions()))
    assert [len(b.texts) for b in batches] == [5, 5, 5, 5, 0]
    assert [b.nbytes for b in batches] == [55, 55, 55, 55, 0]


# ---------------------------------------------------------------------------------- what is broken

BROKEN = {
    '{"text": "a" "b"}': "broken JSON: Expecting ',' delimiter, at column 14",
    '{"txt": "a", "id": 1}': "no field 'text'; its fields: txt, id",
    '{"text": 3}': "field 'text' is a number, not a text",
    '{"text": null}': "field 'text' is null, not a text",
    '{"text": ["a"]}': "field 'text' is a list, not a text",
    '["a"]': "a list, not an object with a field 'text'",
    '{"text": "\\ud800"}': "the text has half of a surrogate pair",
    "[" * 100_000: "recursion",
}


@pytest.mark.parametrize("limit", [10, 1 << 20])
@pytest.mark.parametrize(("line", "why"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, why: str, limit: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good too"}}\n')
    got, (bad,), _ = read(path, limit)
    assert got == ["good", "good too"]
    assert (bad.path, bad.line) == (str(path), 3)
    assert why in bad.why
    assert str(bad).startswith(f"{path}:3: ")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("txt_documents", ["line", "file"])
def test_invalid_utf8(tmp_path: Path, suffix: str, txt_documents: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("löss\n".encode() + b"l\xf6ss\nloss\n"))
    got, (bad,), _ = read(path, txt_documents=txt_documents)
    assert got == (["löss", "loss"] if txt_documents == "line" else [])
    assert (bad.line, bad.why) == (2, "not UTF-8: invalid start byte (0xf6)")


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    array = pa.StringArray.from_buffers(
        4, pa.array([0, 1, 2, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffcd")
    )
    column = pa.concat_arrays([array, pa.array([None], pa.string())])
    pq.write_table(pa.table({"text": column}), path, row_group_size=1)
    got, bad, _ = read(path)
    assert got == ["a", "c", "d"]
    assert [(b.line, b.why) for b in bad] == [
        (2, "not UTF-8: invalid start byte (0xff)"),
        (5, "null, not a text"),
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage", [lambda d: d[:-9], lambda d: d[: len(d) // 2], lambda d: b"no" + d]
)
def test_a_damaged_compressed_file(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](json_lines(texts(2000)))))
    with pytest.raises(FormatError, match=r"a.jsonl.*damaged or cut short"):
        read(path)


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(2000)}), path, row_group_size=500)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(FormatError, match="not a Parquet file, or cut short"):
        read(path)
    path.write_bytes(whole[:200] + bytes(400) + whole[600:])
    with pytest.raises(FormatError, match="damaged"):
        read(path)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(InputError, match=r"no column 'text'; it has id, body\. --text-field"):
        read(path)
    with pytest.raises(InputError, match="column 'id' is int64, not text"):
        read(path, text_field="id")


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [("a.jsonl", Kind.JSON, None), ("a.b.json.gz", Kind.JSON, "gzip"),
     ("a.txt.zst", Kind.TXT, "zstd"), ("a.parquet", Kind.PARQUET, None),
     ("a.npy", Kind.TOKENS, None), ("a.npy.gz", None, "gzip"), ("a.csv", None, None),
     ("jsonl", None, None), ("a.gz", None, "gzip")],
)  # fmt: skip
def test_names(name: str, kind: Kind | None, compression: str | None) -> None:
    assert documents.split_name(name) == (kind, compression)
