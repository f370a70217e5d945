"""The report's table, page, figures and results.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_olmo_bridge.classification.intervals import Interval, wilson
from megatron_olmo_bridge.classification.metrics import Speed, quality
from megatron_olmo_bridge.classification.report import (
    COLUMNS,
    Misread,
    Report,
    Result,
    rows,
    write_report,
)

WIDTHS_AND_THEMES = 4


def result(name: str, classes: int, wrong: int) -> Result:
    true = [i % classes for i in range(4 * classes)]
    predicted = [(t + 1) % classes if i < wrong else t for i, t in enumerate(true)]
    names = [f"<class> {i}" for i in range(classes)]
    found = quality(true, predicted, names)
    misread = [
        Misread(f"text {i} " + "word " * 200, names[t], names[p], 0.9 - 0.1 * i)
        for i, (t, p) in enumerate(zip(true, predicted, strict=True))
        if t != p
    ]
    return Result(
        name,
        1234567,
        found,
        Speed(12.34, 20.0, 81.04, 32, len(true)),
        wilson(len(true) - wrong, len(true)),
        Interval(0.7, 0.95),
        misread,
    )


def written(report: Report, folder: Path) -> str:
    write_report(report, folder)
    return (folder / "classification.html").read_text()


def test_the_table() -> None:
    found = rows([result("olmo", 5, 2)])
    assert COLUMNS[0] == "model"
    assert found == [
        ["olmo", "1,234,567", "0.9000", "0.699-0.972", "0.8992", "0.700-0.950", "12.34", "20.00",
         "81.0"]
    ]  # fmt: skip


def test_one_model_is_reported_alone(tmp_path: Path) -> None:
    page = written(Report("Alone", {}, [result("olmo", 3, 0)]), tmp_path)
    assert "most often confused" not in page
    assert "misread" not in page


@pytest.mark.parametrize("classes", [5, 113])
def test_what_is_written(tmp_path: Path, classes: int) -> None:
    results = [result("olmo & co", classes, 3), result("encoder", classes, 5)]
    page = written(Report("Which?", {"Data": "some <texts>"}, results), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["classification.html", "results.json"]
    assert page.count("data:image/svg+xml;base64,") == 3 * WIDTHS_AND_THEMES
    assert "prefers-color-scheme: dark" in page
    assert "olmo &amp; co" in page and "some &lt;texts&gt;" in page and "<class>" not in page
    assert "http" not in page  # everything is in the file
    values = json.loads((tmp_path / "results.json").read_text())
    first = values["models"][0]
    assert first["quality"]["macro_f1"] == results[0].quality.macro_f1
    assert first["macro_f1_interval"] == [0.7, 0.95]
    assert first["speed"]["p50_ms"] == 12.34
    assert first["confused"][0] == ["<class> 0", "<class> 1", 1]
    assert first["misread"][0]["predicted"] == "<class> 1"


def test_misread_texts_are_shown_shortened(tmp_path: Path) -> None:
    page = written(Report("Which?", {}, [result("olmo", 5, 2)]), tmp_path)
    shown = page[page.index("misread texts") :]
    assert shown.index("text 0 word") < shown.index("text 1 word")
    assert "0.90" in shown
    assert shown.count("word") < 200


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Interval(-0.01, 0.02), "olmo and encoder cannot be told apart on these texts"),
        (Interval(0.01, 0.02), "olmo is better than encoder on these texts"),
        (Interval(-0.02, -0.01), "encoder is better than olmo on these texts"),
    ],
)
def test_the_verdict_follows_the_interval(
    tmp_path: Path, difference: Interval, verdict: str
) -> None:
    both = [result("olmo", 3, 1), result("encoder", 3, 2)]
    assert verdict in written(Report("Which?", {}, both, difference), tmp_path)


def test_the_page_links_the_training_report_beside_it(tmp_path: Path) -> None:
    report = Report("Which?", {}, [result("olmo", 3, 1)])
    assert "report.html" not in written(report, tmp_path)
    (tmp_path / "report.html").touch()
    assert '<a href="report.html">' in written(report, tmp_path)
