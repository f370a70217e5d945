"""The report's table, page, pictures and figures."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from megatron_olmo_bridge.classification.metrics import Speed, quality
from megatron_olmo_bridge.classification.report import COLUMNS, Report, Result, rows, write_report


def result(name: str, classes: int, wrong: int) -> Result:
    true = [i % classes for i in range(4 * classes)]
    predicted = [(t + 1) % classes if i < wrong else t for i, t in enumerate(true)]
    names = [f"<class> {i}" for i in range(classes)]
    return Result(
        name, 1234567, quality(true, predicted, names), Speed(12.34, 20.0, 81.04, 32, len(true))
    )


def test_the_table() -> None:
    found = rows([result("olmo", 5, 2)])
    assert COLUMNS[0] == "model"
    assert found == [["olmo", "1,234,567", "0.9000", "0.8992", "12.34", "20.00", "81.0"]]


def test_one_model_is_reported_alone(tmp_path: Path) -> None:
    write_report(Report("Alone", {}, [result("olmo", 3, 0)]), tmp_path)
    assert "Most often confused" not in (tmp_path / "classification.html").read_text()


def size(picture: Path) -> tuple[int, int]:
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("classes", [5, 113])
def test_what_is_written(tmp_path: Path, classes: int) -> None:
    results = [result("olmo & co", classes, 3), result("encoder", classes, 5)]
    write_report(Report("Which?", {"Data": "some <texts>"}, results), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "classification.html", "confusion-0.png", "confusion-1.png", "results.json", "tradeoff.png"
    ]  # fmt: skip
    for picture in tmp_path.glob("*.png"):
        assert min(size(picture)) > 400
    page = (tmp_path / "classification.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "olmo &amp; co" in page and "some &lt;texts&gt;" in page and "<class>" not in page
    assert "http" not in page  # everything is in the file
    values = json.loads((tmp_path / "results.json").read_text())
    first = values["models"][0]
    assert first["quality"]["macro_f1"] == results[0].quality.macro_f1
    assert first["speed"]["p50_ms"] == 12.34
    assert first["confused"][0] == ["<class> 0", "<class> 1", 1]
