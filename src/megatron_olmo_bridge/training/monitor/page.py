"""HTML of a report: one file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape

from .drawing import DARK, LIGHT, NARROW, WIDE, Size, Theme
from .style import STYLE

SHOWN_ROWS = 25
"""Maximum number of rows of a section that is open at first; a longer one is folded."""
Tile = tuple[str, str, str]
"""Label, value and note of a key figure."""


def page(title: str, parts: Iterable[str]) -> str:
    """Return the whole page; ``title`` is plain text, the parts are HTML."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
            *parts,
            "</main></body></html>",
        ]
    )


def tiles(figures: Iterable[Tile]) -> str:
    """Return the key figures at the top of a page."""
    inner = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
        f'<dd class="note">{escape(note)}</dd></div>'
        for label, value, note in figures
    )
    return f'<dl class="figures">{inner}</dl>'


def picture(
    name: str,
    title: str,
    summary: str,
    svg: Callable[[Theme, Size], bytes],
    *,
    wide: Size = WIDE,
    narrow: Size = NARROW,
) -> str:
    """Return a figure for each theme and screen width; the browser shows the one that fits."""

    def data(theme: Theme, size: Size) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(svg(theme, size)).decode()

    sources = "".join(
        f'<source media="{media}" srcset="{data(theme, size)}">'
        for media, theme, size in (
            ("(max-width: 640px) and (prefers-color-scheme: dark)", DARK, narrow),
            ("(max-width: 640px)", LIGHT, narrow),
            ("(prefers-color-scheme: dark)", DARK, wide),
        )
    )
    return (
        f'<figure id="{name}"><figcaption><h2>{escape(title)}</h2>'
        f"<p>{escape(summary)}</p></figcaption><picture>{sources}"
        f'<img src="{data(LIGHT, wide)}" alt="{escape(title)}. {escape(summary)}">'
        "</picture></figure>"
    )


def folded(title: str, body: str, rows: int, *, is_open: bool | None = None) -> str:
    """Return a section that can be folded; by default it is open if it has few rows."""
    if is_open is None:
        is_open = rows <= SHOWN_ROWS
    return (
        f"<details{' open' if is_open else ''}><summary><h2>{escape(title)}</h2> "
        f"<span>{rows:,}</span></summary>{body}</details>"
    )


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    long: Iterable[str] = (),
    numbers: Iterable[str] = (),
) -> str:
    """Return a table that scrolls sideways on a narrow screen.

    Args:
        long: columns whose cells wrap; the others stay on one line.
        numbers: columns that are aligned to the right.
    """
    styles = dict.fromkeys(long, "long") | dict.fromkeys(numbers, "number")
    classes = [f' class="{styles[name]}"' if name in styles else "" for name in head]

    def line(tag: str, cells: Iterable[str]) -> str:
        inner = (f"<{tag}{c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(line("td", map(linked, row)) for row in rows)
    return (
        f'<div class="scroll"><table><thead>{line("th", map(escape, head))}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def linked(text: str) -> str:
    """Return text as HTML: escaped, and as a link if it is a URL."""
    shown = escape(text)
    if text.startswith(("https://", "http://")) and not any(c.isspace() for c in text):
        return f'<a href="{shown}">{shown}</a>'
    return shown
