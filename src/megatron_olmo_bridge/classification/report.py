"""What came of it: one table, ``results.json``, and ``classification.html`` with its pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from .metrics import Quality, Speed
from .pictures import confusion_picture, tradeoff_picture

RESULTS, PAGE = "results.json", "classification.html"
_PAIRS = 15
"""Confused pairs of classes that the page lists."""


@dataclass(frozen=True)
class Result:
    """Of one classifier."""

    name: str
    parameters: int
    quality: Quality
    speed: Speed


@dataclass(frozen=True)
class Report:
    """Classifiers on the same held-out texts, timed on the same device."""

    title: str
    setting: dict[str, str]
    """What a reader must know of data and device, in the order of the page."""
    results: Sequence[Result]


COLUMNS = [
    "model", "parameters", "accuracy", "macro-F1", "p50 ms", "p95 ms", "texts/s",
]  # fmt: skip


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table's rows, for :data:`COLUMNS`; times are of one text, texts/s is in batches."""
    return [
        [
            r.name, f"{r.parameters:,}", f"{r.quality.accuracy:.4f}", f"{r.quality.macro_f1:.4f}",
            f"{r.speed.p50_ms:.2f}", f"{r.speed.p95_ms:.2f}", f"{r.speed.texts_per_s:.1f}",
        ]
        for r in results
    ]  # fmt: skip


def write_report(report: Report, folder: Path) -> None:
    """Write ``results.json``, the pictures and last ``classification.html`` into a folder."""
    numbered = enumerate(report.results)
    pictures = {f"confusion-{i}.png": confusion_picture(r.name, r.quality) for i, r in numbered}
    pictures["tradeoff.png"] = tradeoff_picture(
        [(r.name, r.speed.p50_ms, r.quality.macro_f1) for r in report.results]
    )
    for name, data in pictures.items():
        _write(folder / name, data)
    results = {
        "setting": report.setting,
        "models": [
            {**asdict(r), "confused": [list(pair) for pair in r.quality.confused]}
            for r in report.results
        ],
    }
    _write(folder / RESULTS, json.dumps(results, indent=1).encode() + b"\n")
    _write(folder / PAGE, _page(report, pictures).encode())


def _write(file: Path, data: bytes) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(data)
    partial.replace(file)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2430; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #dde3ea; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
th { color: #5a6675; font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
summary { cursor: pointer; color: #2b5d9b; }
.setting { color: #5a6675; }
"""


def _page(report: Report, pictures: dict[str, bytes]) -> str:
    setting = "<br>".join(f"{escape(k)}: {escape(v)}" for k, v in report.setting.items())
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        _table(COLUMNS, rows(report.results)),
        f'<p class="setting">{setting}</p>',
        _image(pictures["tradeoff.png"], "Quality against latency"),
    ]
    for i, result in enumerate(report.results):
        found = result.quality
        parts += [
            f"<h2>{escape(result.name)}</h2>",
            _image(pictures[f"confusion-{i}.png"], f"Confusion matrix of {result.name}"),
        ]
        if found.confused:
            parts.append("<h3>Most often confused</h3>")
            pairs = [[a, b, str(n)] for a, b, n in found.confused[:_PAIRS]]
            parts.append(_table(["is", "labelled as", "times"], pairs, texts=2))
        ratios = [
            [c.name, f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", str(c.count)]
            for c in found.classes
        ]
        each = _table(["class", "precision", "recall", "F1", "examples"], ratios)
        parts.append(f"<details><summary>Each class</summary>{each}</details>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="text"' if i < texts else "" for i in range(len(cells))]
        inner = "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(line("td", cells) for cells in lines)
    return f"<table>{line('th', columns)}\n{body}</table>"


def _image(data: bytes, what: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<p><img alt="{escape(what)}" src="data:image/png;base64,{encoded}"></p>'
