"""``report.html``: one page about a training run, made from its log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import MissingPackageError, install_hint
from megatron_olmo_bridge.storage.atomic import replace_file

from .history import RunHistory
from .human import compact, duration, flops, heading, short, when
from .log_file import Line
from .page import Tile, folded, page, picture, table, tiles

NAME = "report.html"
CLASSIFICATION = "classification.html"
"""Name of the report on a classifier's quality and speed, if there is one in the run's folder."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder; the run may still be running.

    The file needs no network: pictures and style are in it. The same log gives the same bytes.

    Args:
        folder: the run's folder, with ``log.jsonl``.

    Returns:
        Path of the report.

    Raises:
        InputError: the folder has no log.
        MissingPackageError: matplotlib is not installed.
        FormatError: the log is damaged.
    """
    history = RunHistory.read(folder)
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise MissingPackageError(f"the report needs matplotlib: {install_hint('train')}") from None
    path = folder / NAME
    replace_file(path, _page(history, folder))
    return path


def _page(history: RunHistory, folder: Path) -> str:
    from .plots import plots

    return page(
        f"{history.facts.name} · training report",
        [
            _header(history),
            f'<nav><a href="{CLASSIFICATION}">Quality and speed of the classifier</a></nav>'
            if (folder / CLASSIFICATION).is_file()
            else "",
            _figures(history),
            *(picture(plot.name, plot.title, plot.summary, plot.svg) for plot in plots(history)),
            "" if history.steps else "<figure><p>No steps yet, and so no curves.</p></figure>",
            _events(history),
            _configuration(history),
            _footer(history),
        ],
    )


def _header(history: RunHistory) -> str:
    facts = history.facts
    about = (
        f"{short(facts.parameters)} parameters, {facts.steps:,} steps of "
        f"{short(facts.tokens_per_step)} tokens, on {facts.hardware}"
    )
    return (
        f'<header><p class="eyebrow">Training report</p><h1>{escape(facts.name)}</h1>'
        f'<p class="about">{escape(about)}</p>'
        f'<p class="state {history.state}"><strong>{history.state}</strong> '
        f"<span>{escape(history.sentence)}</span></p></header>"
    )


def _figures(history: RunHistory) -> str:
    facts, known = history.facts, history.figures()
    total = facts.steps * facts.tokens_per_step
    evaluated = history.evaluations
    evaluated_at = f"at step {evaluated[-1]['step']:,}" if evaluated else "there was none"
    loss = "Final loss" if history.state == "done" else "Loss"
    shown: list[Tile] = [(loss, _loss(known["loss"], history.steps), facts.loss_unit)]
    if facts.has_perplexity:
        perplexity = _or_dash(known["perplexity"], lambda value: compact(value, 2))
        shown.append(("Perplexity", perplexity, "exp(loss)"))
    shown.append(("Evaluation loss", _loss(known["evaluation_loss"], evaluated), evaluated_at))
    for name in history.measures:
        value = _loss(known[f"evaluation_{name}"], evaluated)
        shown.append((heading(name), value, evaluated_at))
    flops_per_second = _or_dash(known["flops_per_second"], flops)
    shown += [
        ("Tokens", short(known["tokens"]), f"of {short(total)}"),
        ("Parameters", short(known["parameters"]), f"{known['parameters']:,}"),
        ("Time in steps", duration(known["seconds"]), "without evaluating and saving"),
        ("Tokens/s", _or_dash(known["tokens_per_second"], short), flops_per_second),
    ]
    if known["utilisation"] is not None:
        shown.append(("Utilization", f"{known['utilisation']:.1%}", "of the bfloat16 peak"))
    if known["skipped"]:
        shown.append(("Skipped steps", f"{known['skipped']:,}", f"of {known['step']:,}"))
    return tiles(shown)


def _events(history: RunHistory) -> str:
    rows = [
        [
            f"{event['step']:,}",
            event["event"],
            when(event["time"]),
            ", ".join(str(event[key]) for key in ("message", "path") if key in event),
        ]
        for event in history.events
    ]
    body = table(["Step", "Event", "Time", "Details"], rows, long=["Details"])
    return folded("Events", body, len(rows))


def _configuration(history: RunHistory) -> str:
    """Return a table of the config: each field, its value, and the source of a published value."""
    config = dict(history.facts.config)
    sources = config.pop("sources", None) or {}
    rows: list[list[str]] = []
    for section, value in config.items():
        if isinstance(value, dict) and section in sources:
            rows.append([section, "", sources[section]])
        rows += [[key, text, sources.get(key, "")] for key, text in _flat({section: value})]
    head = ["Field", "Value", "Source"] if sources else ["Field", "Value"]
    body = table(head, [row[: len(head)] for row in rows], long=["Value", "Source"])
    return folded("Configuration", body, len(rows))


def _flat(value: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        name = f"{above}{key}"
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{name}.")
        else:
            yield name, inner if isinstance(inner, str) else json.dumps(inner)


def _footer(history: RunHistory) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in history.facts.versions.items())
    begun = when(history.events[0]["time"])
    return (
        f"<footer><p>Begun {begun}; last line of the log {when(history.last_time)}.</p>"
        f"<p>{escape(versions)}</p>"
        f"<p>Made from log.jsonl by megatron-olmo-bridge {__version__}.</p></footer>"
    )


def _or_dash(value: float | None, formatted: Callable[[float], str]) -> str:
    return "-" if value is None else formatted(value)


def _loss(value: float | None, lines: list[Line]) -> str:
    return "NaN" if value is None and lines else _or_dash(value, "{:.4f}".format)
