"""The results of a comparison: a table, ``results.json`` and ``classification.html``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path

from megatron_olmo_bridge.training.monitor.human import short
from megatron_olmo_bridge.training.monitor.page import Tile, folded, page, picture, table, tiles
from megatron_olmo_bridge.training.monitor.report import NAME as TRAINING_REPORT

from .intervals import Interval
from .metrics import Quality, Speed
from .pictures import confusion_sizes, confusion_svg, tradeoff_svg

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
    confidence: float
    """Probability of the predicted class."""


@dataclass(frozen=True)
class Result:
    """What was measured of one classifier."""

    name: str
    parameters: int
    quality: Quality
    speed: Speed
    accuracy_interval: Interval
    macro_f1_interval: Interval
    """95 % confidence intervals over the held-out texts."""
    misread: Sequence[Misread] = ()
    """The most confident first."""


@dataclass(frozen=True)
class Report:
    """Classifiers on the same held-out texts, timed on the same device."""

    title: str
    setting: dict[str, str]
    """What a reader must know of data and device, in the order of the page."""
    results: Sequence[Result]
    difference: Interval | None = None
    """Of two classifiers: 95 % confidence interval of the first one's macro-F1 minus the
    second one's, on the same texts."""


COLUMNS = [
    "model", "parameters", "accuracy", "95 %", "macro-F1", "95 %", "p50 ms", "p95 ms", "texts/s",
]  # fmt: skip


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Return rows for :data:`COLUMNS`; times are of one text, texts/s is in batches."""
    return [
        [
            r.name, f"{r.parameters:,}",
            f"{r.quality.accuracy:.4f}", _span(r.accuracy_interval),
            f"{r.quality.macro_f1:.4f}", _span(r.macro_f1_interval),
            f"{r.speed.p50_ms:.2f}", f"{r.speed.p95_ms:.2f}", f"{r.speed.texts_per_s:.1f}",
        ]
        for r in results
    ]  # fmt: skip


def _span(interval: Interval) -> str:
    return f"{interval.low:.3f}-{interval.high:.3f}"


def write_report(report: Report, folder: Path) -> None:
    """Write ``results.json`` and then ``classification.html`` into a folder."""
    results = {
        "setting": report.setting,
        "macro_f1_difference": report.difference,
        "models": [
            {**asdict(r), "confused": [list(pair) for pair in r.quality.confused]}
            for r in report.results
        ],
    }
    _write(folder / RESULTS, json.dumps(results, indent=1).encode() + b"\n")
    _write(folder / PAGE, _page(report, (folder / TRAINING_REPORT).is_file()).encode())


def _write(file: Path, data: bytes) -> None:
    partial_file = file.with_name(file.name + ".partial")
    partial_file.write_bytes(data)
    partial_file.replace(file)


def _page(report: Report, trained_here: bool) -> str:
    first = report.results[0]
    points = [(r.name, r.speed.p50_ms, r.quality.macro_f1) for r in report.results]
    link = f'<nav><a href="{TRAINING_REPORT}">How it was trained</a></nav>' if trained_here else ""
    return page(
        report.title,
        [
            f'<header><p class="eyebrow">Classification report</p><h1>{escape(report.title)}</h1>'
            f'<p class="about">{escape(_verdict(report))}</p>{link}</header>',
            tiles(_figures(first)),
            _section("All classifiers", table(COLUMNS, rows(report.results), numbers=COLUMNS[1:])),
            picture(
                "tradeoff",
                "Quality against latency",
                "Macro-F1 on the held-out texts and the median time for one text. "
                "The upper left is better.",
                partial(tradeoff_svg, points),
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
    span = f"the difference in macro-F1 is {low:+.3f} to {high:+.3f} (95 %)"
    if low <= 0 <= high:
        return f"{names[0]} and {names[1]} cannot be told apart on these texts: {span}."
    better, worse = names if low > 0 else reversed(names)
    return f"{better} is better than {worse} on these texts: {span}, {names[0]} minus {names[1]}."


def _figures(result: Result) -> list[Tile]:
    return [
        ("Accuracy", f"{result.quality.accuracy:.4f}", f"95 %: {_span(result.accuracy_interval)}"),
        ("Macro-F1", f"{result.quality.macro_f1:.4f}", f"95 %: {_span(result.macro_f1_interval)}"),
        ("Latency", f"{result.speed.p50_ms:.2f} ms", "median of one text"),
        ("Throughput", f"{result.speed.texts_per_s:.1f}", "texts/s in batches"),
        ("Parameters", short(result.parameters), result.name),
    ]


def _details(number: int, result: Result) -> list[str]:
    found = result.quality
    wide, narrow = confusion_sizes(len(found.classes))
    parts = [
        picture(
            f"confusion-{number}",
            f"{result.name}: confusion matrix",
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
        parts.append(folded(f"{result.name}: most often confused", body, len(pairs)))
    if result.misread:
        shown = result.misread[:_MISREAD]
        texts = [[m.true, m.predicted, f"{m.confidence:.2f}", _shortened(m.text)] for m in shown]
        body = table(
            ["true class", "labeled as", "confidence", "text"],
            texts,
            long=["true class", "labeled as", "text"],
            numbers=["confidence"],
        )
        title = f"{result.name}: misread texts, the most confident first"
        parts.append(folded(title, body, len(result.misread), is_open=False))
    ratios = [
        [c.name, f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", str(c.count)]
        for c in found.classes
    ]
    head = ["class", "precision", "recall", "F1", "examples"]
    each = table(head, ratios, numbers=head[1:])
    parts.append(folded(f"{result.name}: each class", each, len(ratios), is_open=False))
    return parts


def _shortened(text: str) -> str:
    return textwrap.shorten(text, _TEXT_LENGTH, placeholder=" …")


def _setting(setting: dict[str, str]) -> str:
    return table(["setting", "value"], [list(item) for item in setting.items()], long=["value"])


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"
