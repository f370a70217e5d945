"""The report's table, page, figures and results.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparison.intervals import Interval, wilson
from comparison.report import (
    Misread,
    Report,
    Result,
    columns,
    rows,
    write_report,
)
from comparison.speed import Speed

from megatron_olmo_bridge.tasks.classification.problems import MultiLabel, Regression, SingleLabel

WIDTHS_AND_THEMES = 4
SINGLE, MULTI, REGRESSION = SingleLabel(), MultiLabel(), Regression()


def result(name: str, classes: int, wrong: int) -> Result:
    true = [i % classes for i in range(4 * classes)]
    predicted = [(t + 1) % classes if i < wrong else t for i, t in enumerate(true)]
    names = [f"<class> {i}" for i in range(classes)]
    counts = SINGLE.counts(torch.tensor(true), torch.tensor(predicted), classes)
    found = SINGLE.quality(counts, names)
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
        {"accuracy": wilson(len(true) - wrong, len(true)), "macro_f1": Interval(0.7, 0.95)},
        misread,
    )


def written(report: Report, folder: Path) -> str:
    write_report(report, folder)
    return (folder / "classification.html").read_text()


def test_the_table() -> None:
    one = Report("One", SINGLE, {}, [result("olmo", 5, 2)])
    assert columns(one) == [
        "model",
        "parameters",
        "accuracy",
        "95 %",
        "macro-F1",
        "95 %",
        "p50 ms",
        "p95 ms",
        "texts/s",
    ]
    assert rows(one) == [
        [
            "olmo",
            "1,234,567",
            "0.9000",
            "0.699-0.972",
            "0.8992",
            "0.700-0.950",
            "12.34",
            "20.00",
            "81.0",
        ]
    ]


def test_one_model_is_reported_alone(tmp_path: Path) -> None:
    page = written(Report("Alone", SINGLE, {}, [result("olmo", 3, 0)]), tmp_path)
    assert "most often confused" not in page
    assert "misread" not in page


@pytest.mark.parametrize("classes", [5, 113])
def test_what_is_written(tmp_path: Path, classes: int) -> None:
    results = [result("olmo & co", classes, 3), result("encoder", classes, 5)]
    page = written(Report("Which?", SINGLE, {"Data": "some <texts>"}, results), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["classification.html", "results.json"]
    assert page.count("data:image/svg+xml;base64,") == 3 * WIDTHS_AND_THEMES
    assert "prefers-color-scheme: dark" in page
    assert "olmo &amp; co" in page and "some &lt;texts&gt;" in page and "<class>" not in page
    assert "http" not in page  # everything is in the file
    values = json.loads((tmp_path / "results.json").read_text())
    first = values["models"][0]
    assert first["quality"]["macro_f1"] == results[0].quality.macro_f1
    assert first["intervals"]["macro_f1"] == [0.7, 0.95]
    assert first["speed"]["p50_ms"] == 12.34
    assert first["confused"][0] == ["<class> 0", "<class> 1", 1]
    assert first["misread"][0]["predicted"] == "<class> 1"


def test_misread_texts_are_shown_shortened(tmp_path: Path) -> None:
    page = written(Report("Which?", SINGLE, {}, [result("olmo", 5, 2)]), tmp_path)
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
    assert verdict in written(Report("Which?", SINGLE, {}, both, difference), tmp_path)


def test_the_page_links_the_training_report_beside_it(tmp_path: Path) -> None:
    report = Report("Which?", SINGLE, {}, [result("olmo", 3, 1)])
    assert "report.html" not in written(report, tmp_path)
    (tmp_path / "report.html").touch()
    assert '<a href="report.html">' in written(report, tmp_path)


SPEED = Speed(12.34, 20.0, 81.04, 32, 3)


def test_a_report_on_several_labels(tmp_path: Path) -> None:
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    predictions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = MULTI.quality(MULTI.counts(labels, predictions, 2), ["a", "b"])
    intervals = {"micro_f1": Interval(0.6, 0.9), "macro_f1": Interval(0.4, 0.6)}
    misread = [Misread("a text", "a, b", "a", 0.75)]
    one = Report("One", MULTI, {}, [Result("olmo", 5, found, SPEED, intervals, misread)])
    page = written(one, tmp_path)
    assert columns(one)[2:7] == ["micro-F1", "95 %", "macro-F1", "95 %", "exact-match"]
    assert rows(one)[0][2:7] == ["0.8000", "0.600-0.900", "0.5000", "0.400-0.600", "0.6667"]
    assert "confusion" not in page and "each class" in page and "a, b" in page
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["problem_type"] == "multi_label_classification"
    assert [c["f1"] for c in values["models"][0]["quality"]["classes"]] == [1.0, 0.0]


def test_a_report_on_values(tmp_path: Path) -> None:
    true, predicted = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [2.0], [5.0]])
    found = REGRESSION.quality(REGRESSION.counts(true, predicted, 1), ["stars"])
    intervals = {"mae": Interval(0.0, 2.0), "r2": Interval(-2.0, 1.0)}
    misread = [Misread("a text", "3", "5", 2.0)]
    one = Report("One", REGRESSION, {}, [Result("olmo", 5, found, SPEED, intervals, misread)])
    page = written(one, tmp_path)
    assert columns(one)[2:8] == ["MSE", "MAE", "95 %", "R2", "95 %", "Pearson"]
    assert rows(one)[0][2:8] == [
        "1.3333",
        "0.6667",
        "0.000-2.000",
        "-1.0000",
        "-2.000 to 1.000",
        "0.9608",
    ]
    assert "largest errors" in page and "each value" in page and "confusion" not in page
    assert json.loads((tmp_path / "results.json").read_text())["r2_difference"] is None
