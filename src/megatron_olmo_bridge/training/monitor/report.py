"""``report.html``: a training run on one page, made from its log."""

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
"""Name, in the run's folder, of the report on a fine-tuned classifier's quality and speed."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, at any time: also while the run goes on.

    One file that needs no network: pictures and style are in it. The same log gives the same bytes.

    Args:
        folder: The run's folder, with ``log.jsonl``.

    Returns:
        The report's path.

    Raises:
        InputError: The folder has no log.
        MissingPackageError: matplotlib is not installed.
        FormatError: The log is damaged.
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
            _links(folder),
            _figures(history),
            *(picture(plot.name, plot.title, plot.summary, plot.svg) for plot in plots(history)),
            "" if history.steps else "<figure><p>No steps yet, and so no curves.</p></figure>",
            _events(history),
            _configuration(history),
            _footer(history),
        ],
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


def _links(folder: Path) -> str:
    """Link the reports that stand beside this one."""
    if not (folder / CLASSIFICATION).is_file():
        return ""
    return f'<nav><a href="{CLASSIFICATION}">Quality and speed of the classifier</a></nav>'


def _figures(history: RunHistory) -> str:
    facts, known = history.facts, history.figures()
    total = facts.steps * facts.tokens_per_step
    done, evaluated = history.state == "done", history.evaluations
    evaluated_at = f"at step {evaluated[-1]['step']:,}" if evaluated else "there was none"
    shown: list[Tile] = [
        ("Final loss" if done else "Loss", _loss(known["loss"], history.steps), facts.loss_unit),
        *(
            [("Perplexity", _known(known["perplexity"], lambda p: compact(p, 2)), "exp(loss)")]
            if facts.has_perplexity
            else []
        ),
        ("Evaluation loss", _loss(known["evaluation_loss"], evaluated), evaluated_at),
        *(
            (heading(n), _loss(known[f"evaluation_{n}"], evaluated), evaluated_at)
            for n in history.measures
        ),
        ("Tokens", short(known["tokens"]), f"of {short(total)}"),
        ("Parameters", short(known["parameters"]), f"{known['parameters']:,}"),
        ("Time in steps", duration(known["seconds"]), "without evaluating and saving"),
        (
            "Tokens/s",
            _known(known["tokens_per_second"], short),
            _known(known["flops_per_second"], flops),
        ),
    ]
    if known["utilisation"] is not None:
        shown.append(("Utilization", f"{known['utilisation']:.1%}", "of the bfloat16 peak"))
    if known["skipped"]:
        shown.append(("Skipped steps", f"{known['skipped']:,}", f"of {known['step']:,}"))
    return tiles(shown)


# -------------------------------------------------------------------------------------- the middle


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


def _known(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def _loss(value: float | None, lines: list[Line]) -> str:
    return "NaN" if value is None and lines else _known(value, "{:.4f}".format)
