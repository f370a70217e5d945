"""``report.html``: a run on one page, made from its log alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import InputError

from .history import RunHistory
from .human import compact, duration, flops, short, when
from .log_file import Line
from .style import STYLE

if TYPE_CHECKING:
    from .plots import Plot

NAME = "report.html"
SHOWN_EVENTS = 25
"""Rows of a table that stands open; longer ones are folded."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, at any time: also while the run goes on.

    One file that needs no network: pictures and style are in it. The same log gives the same bytes.

    Args:
        folder: The run's folder, with ``log.jsonl``.

    Returns:
        The report's path.

    Raises:
        InputError: The folder has no log, or matplotlib is missing.
        FormatError: The log is damaged.
    """
    history = RunHistory.read(folder)
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise InputError(
            "the report needs matplotlib: pip install 'megatron-olmo-bridge[train]'"
        ) from None
    path = folder / NAME
    temporary = path.with_name(f".{NAME}.tmp")
    temporary.write_text(_page(history), encoding="utf-8")
    return temporary.replace(path)


def _page(history: RunHistory) -> str:
    from .plots import plots

    name = escape(history.facts.name)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{name} · training report</title><style>{STYLE}</style></head><body><main>",
            _header(history),
            _figures(history),
            *(_picture(plot) for plot in plots(history)),
            "" if history.steps else "<figure><p>No steps yet, and so no curves.</p></figure>",
            _events(history),
            _configuration(history),
            _footer(history),
            "</main></body></html>",
        ]
    )


# ----------------------------------------------------------------------------------------- the top


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
    known = history.figures()
    total = history.facts.steps * history.facts.tokens_per_step
    done, evaluated = history.state == "done", history.evaluations
    tiles = [
        ("Final loss" if done else "Loss", _loss(known["loss"], history.steps), "nats per token"),
        ("Perplexity", _known(known["perplexity"], lambda p: compact(p, 2)), "exp of the loss"),
        ("Evaluation loss", _loss(known["evaluation_loss"], evaluated),
         f"at step {evaluated[-1]['step']:,}" if evaluated else "there was none"),
        ("Tokens", short(known["tokens"]), f"of {short(total)}"),
        ("Parameters", short(known["parameters"]), f"{known['parameters']:,}"),
        ("Time trained", duration(known["seconds"]), "in steps alone"),
        ("Tokens/s", _known(known["tokens_per_second"], short),
         _known(known["flops_per_second"], flops)),
    ]  # fmt: skip
    if known["utilisation"] is not None:
        tiles.append(("Utilisation", f"{known['utilisation']:.1%}", "of the bfloat16 peak"))
    if known["skipped"]:
        tiles.append(("Skipped steps", f"{known['skipped']:,}", f"of {known['step']:,}"))
    return (
        '<dl class="figures">'
        + "".join(
            f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
            f'<dd class="note">{escape(note)}</dd></div>'
            for label, value, note in tiles
        )
        + "</dl>"
    )


# -------------------------------------------------------------------------------------- the middle


def _picture(plot: Plot) -> str:
    """A figure for each theme and width; the browser takes the one that fits."""
    from .plots import DARK, LIGHT, NARROW, WIDE

    def data(*args: Any) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(plot.svg(*args)).decode()

    sources = "".join(
        f'<source media="{media}" srcset="{data(theme, size)}">'
        for media, theme, size in (
            ("(max-width: 640px) and (prefers-color-scheme: dark)", DARK, NARROW),
            ("(max-width: 640px)", LIGHT, NARROW),
            ("(prefers-color-scheme: dark)", DARK, WIDE),
        )
    )
    return (
        f'<figure id="{plot.name}"><figcaption><h2>{escape(plot.title)}</h2>'
        f"<p>{escape(plot.summary)}</p></figcaption><picture>{sources}"
        f'<img src="{data(LIGHT, WIDE)}" alt="{escape(plot.title)} over tokens and steps. '
        f'{escape(plot.summary)}"></picture></figure>'
    )


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
    return _folded("Events", _table(["Step", "Event", "Time", "Details"], rows), len(rows))


# -------------------------------------------------------------------------------------- the bottom


def _configuration(history: RunHistory) -> str:
    """Each field as the command line overrides it, and where a published value comes from."""
    config = dict(history.facts.config)
    sources = config.pop("sources", None) or {}
    rows: list[list[str]] = []
    for section, value in config.items():
        if isinstance(value, dict) and section in sources:
            rows.append([section, "", sources[section]])
        rows += [[key, text, sources.get(key, "")] for key, text in _flat({section: value})]
    head = ["Field", "Value", "Source"] if sources else ["Field", "Value"]
    return _folded("Configuration", _table(head, [row[: len(head)] for row in rows]), len(rows))


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


# --------------------------------------------------------------------------------------- the parts


def _folded(title: str, body: str, rows: int) -> str:
    is_open = " open" if rows <= SHOWN_EVENTS else ""
    return (
        f"<details{is_open}><summary><h2>{title}</h2> <span>{rows:,}</span></summary>"
        f"{body}</details>"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Cells that may be long wrap; the others stay on a line."""
    long = {"Details", "Value", "Source"}
    kinds = ['<td class="long">' if name in long else "<td>" for name in head]
    body = "".join(
        "<tr>" + "".join(f"{k}{_linked(c)}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll"><table><thead><tr>'
        + "".join(f"<th>{name}</th>" for name in head)
        + f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _linked(text: str) -> str:
    """Escaped, and a link if it is one."""
    shown = escape(text)
    if text.startswith(("https://", "http://")) and not any(c.isspace() for c in text):
        return f'<a href="{shown}">{shown}</a>'
    return shown


def _known(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def _loss(value: float | None, lines: list[Line]) -> str:
    return "NaN" if value is None and lines else _known(value, "{:.4f}".format)
