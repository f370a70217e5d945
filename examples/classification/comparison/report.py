"""Write the results of a comparison: a table, ``results.json``, ``classification.html``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.storage.atomic import replace_file
from megatron_olmo_bridge.tasks.classification.metrics import Metrics, Quality, RegressionQuality
from megatron_olmo_bridge.tasks.classification.problems import Problem
from megatron_olmo_bridge.training.monitor.human import heading, short, spoken
from megatron_olmo_bridge.training.monitor.page import Tile, folded, page, picture, table, tiles
from megatron_olmo_bridge.training.monitor.report import NAME as TRAINING_REPORT

from .intervals import Interval
from .pictures import confusion_sizes, confusion_svg, tradeoff_svg
from .speed import Speed

RESULTS, PAGE = "results.json", "classification.html"
_PAIRS = 15
"""Confused pairs of classes that the page lists."""
_MISREAD = 20
"""Misread texts that the page lists."""
_TEXT_LENGTH = 400
"""Characters of a misread text that the page shows."""


@dataclass(frozen=True)
class Misread:
    """A held-out text with a wrong prediction."""

    text: str
    true: str
    predicted: str
    distance: float
    """Probability of the wrong class, or absolute error."""


@dataclass(frozen=True)
class Result:
    """What was measured of one classifier."""

    name: str
    parameters: int
    quality: Metrics
    speed: Speed
    intervals: dict[str, Interval]
    """95 % confidence intervals over the held-out texts, of some measures."""
    misread: Sequence[Misread] = ()
    """Texts that were misread, the largest errors first."""


@dataclass(frozen=True)
class Report:
    """Classifiers on the same held-out texts, timed on the same device."""

    title: str
    problem: Problem
    setting: dict[str, str]
    """What a reader must know of data and device, in the order of the page."""
    results: Sequence[Result]
    difference: Interval | None = None
    """95 % confidence interval of the first classifier's score minus the second's, on the same
    texts; None for a single classifier."""


def columns(report: Report) -> list[str]:
    """Return the head of the table; times are of one text, texts/s is in batches."""
    first = report.results[0]
    measures = [
        column
        for name in first.quality.measures
        for column in (spoken(name), *(["95 %"] if name in first.intervals else []))
    ]
    return ["model", "parameters", *measures, "p50 ms", "p95 ms", "texts/s"]


def rows(report: Report) -> list[list[str]]:
    """Return the rows for :func:`columns`."""
    return [
        [
            r.name,
            f"{r.parameters:,}",
            *_measures(r),
            f"{r.speed.p50_ms:.2f}",
            f"{r.speed.p95_ms:.2f}",
            f"{r.speed.texts_per_s:.1f}",
        ]
        for r in report.results
    ]


def _measures(result: Result) -> list[str]:
    return [
        cell
        for name, value in result.quality.measures.items()
        for cell in (
            f"{value:.4f}",
            *([_span(result.intervals[name])] if name in result.intervals else []),
        )
    ]


def _span(interval: Interval) -> str:
    dash = "-" if interval.low >= 0 else " to "
    return f"{interval.low:.3f}{dash}{interval.high:.3f}"


def write_report(report: Report, folder: Path) -> None:
    """Write ``results.json`` and then ``classification.html`` into a folder."""
    results = {
        "setting": report.setting,
        "problem_type": report.problem.problem_type,
        f"{report.problem.score}_difference": report.difference,
        "models": [{**asdict(r), **_confused(r.quality)} for r in report.results],
    }
    replace_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    replace_file(folder / PAGE, _page(report, (folder / TRAINING_REPORT).is_file()))


def _confused(quality: Metrics) -> dict[str, list[list[Any]]]:
    if not isinstance(quality, Quality):
        return {}
    return {"confused": [list(pair) for pair in quality.confused]}


def _page(report: Report, trained_here: bool) -> str:
    first = report.results[0]
    score = report.problem.score
    points = [(r.name, r.speed.p50_ms, r.quality.measures[score]) for r in report.results]
    head = columns(report)
    link = f'<nav><a href="{TRAINING_REPORT}">How it was trained</a></nav>' if trained_here else ""
    return page(
        report.title,
        [
            f'<header><p class="eyebrow">Classification report</p><h1>{escape(report.title)}</h1>'
            f'<p class="about">{escape(_verdict(report))}</p>{link}</header>',
            tiles(_figures(first)),
            _section("All models", table(head, rows(report), numbers=head[1:])),
            picture(
                "tradeoff",
                "Quality against latency",
                f"{heading(score)} on the held-out texts and the median time for one text. "
                "The upper left is better.",
                partial(tradeoff_svg, points, spoken(score)),
            ),
            *(part for i, result in enumerate(report.results) for part in _details(i, result)),
            _section("Setting", _setting(report.setting)),
        ],
    )


def _verdict(report: Report) -> str:
    """Say in a sentence which classifier is better, if the texts are enough to tell."""
    names = [r.name for r in report.results]
    if report.difference is None:
        return names[0]
    low, high = report.difference
    score = spoken(report.problem.score)
    span = f"the difference in {score} is {low:+.3f} to {high:+.3f} (95\u00a0%)"
    if low <= 0 <= high:
        return f"{names[0]} and {names[1]} cannot be told apart on these texts: {span}."
    better, worse = names if low > 0 else reversed(names)
    return f"{better} is better than {worse} on these texts: {span}, {names[0]} minus {names[1]}."


def _figures(result: Result) -> list[Tile]:
    return [
        *(
            (heading(name), f"{result.quality.measures[name]:.4f}", f"95 %: {_span(interval)}")
            for name, interval in result.intervals.items()
        ),
        ("Latency", f"{result.speed.p50_ms:.2f} ms", "median of one text"),
        ("Throughput", f"{result.speed.texts_per_s:.1f}", "texts/s in batches"),
        ("Parameters", short(result.parameters), result.name),
    ]


def _details(number: int, result: Result) -> list[str]:
    found = result.quality
    parts = [_misread_table(result)] if result.misread else []
    if isinstance(found, Quality):
        parts = [*_confusion(number, result.name, found), *parts]
    parts.append(_each(result.name, found))
    return parts


def _confusion(number: int, name: str, found: Quality) -> list[str]:
    wide, narrow = confusion_sizes(len(found.classes))
    parts = [
        picture(
            f"confusion-{number}",
            f"{name}: confusion matrix",
            "Each row shows how the texts of one class were labeled.",
            partial(confusion_svg, str(number), found),
            wide=wide,
            narrow=narrow,
        )
    ]
    if found.confused:
        pairs = [[a, b, str(n)] for a, b, n in found.confused[:_PAIRS]]
        head = ["true class", "labeled as", "times"]
        body = table(head, pairs, long=head[:2], numbers=["times"])
        parts.append(folded(f"{name}: most often confused", body, len(pairs)))
    return parts


def _misread_table(result: Result) -> str:
    shown = result.misread[:_MISREAD]
    texts = [[m.true, m.predicted, f"{m.distance:.2f}", _shortened(m.text)] for m in shown]
    title, head = (
        (f"{result.name}: the largest errors", ["true", "predicted", "error", "text"])
        if isinstance(result.quality, RegressionQuality)
        else (
            f"{result.name}: misread texts, the most confident first",
            ["true class", "labeled as", "confidence", "text"],
        )
    )
    body = table(head, texts, long=[*head[:2], "text"], numbers=[head[2]])
    return folded(title, body, len(result.misread), is_open=False)


def _each(name: str, found: Metrics) -> str:
    """Return the table of each class, or of each value."""
    if isinstance(found, RegressionQuality):
        head = ["value", "MSE", "MAE", "R2", "Pearson"]
        lines = [
            [t.name, *(f"{value:.4g}" for value in (t.mse, t.mae, t.r2, t.pearson))]
            for t in found.targets
        ]
        return folded(f"{name}: each value", table(head, lines, numbers=head[1:]), len(lines))
    head = ["class", "precision", "recall", "F1", "examples"]
    lines = [
        [c.name, f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", str(c.count)]
        for c in found.classes
    ]
    body = table(head, lines, numbers=head[1:])
    return folded(f"{name}: each class", body, len(lines), is_open=False)


def _shortened(text: str) -> str:
    return textwrap.shorten(text, _TEXT_LENGTH, placeholder=" …")


def _setting(setting: dict[str, str]) -> str:
    return table(["setting", "value"], [list(item) for item in setting.items()], long=["value"])


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"
