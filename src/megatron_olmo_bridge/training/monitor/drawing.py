"""Figures of reports as SVG, for light and dark themes, wide and narrow screens."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONTS = ["Inter", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"]
Size = tuple[float, float]
"""Width and height in inches, of 72 CSS pixels each in the SVG."""
WIDE: Size = (9.4, 3.5)
NARROW: Size = (4.6, 3.3)


@dataclass(frozen=True)
class Theme:
    """Colours that are legible on the page's background in one theme."""

    ink: str
    muted: str
    grid: str
    faint: str
    main: str
    second: str
    bad: str
    mark: str
    on_main: str
    """Colour of text on an area of the main colour."""


LIGHT = Theme(
    ink="#1c2330",
    muted="#667085",
    grid="#e7eaf0",
    faint="#a9c0ee",
    main="#2557c7",
    second="#c2590a",
    bad="#c4262e",
    mark="#7a3fc0",
    on_main="#ffffff",
)
DARK = Theme(
    ink="#e7eaf1",
    muted="#97a1b3",
    grid="#2a303d",
    faint="#3d5a99",
    main="#84abff",
    second="#ffa657",
    bad="#ff7b72",
    mark="#c59bff",
    on_main="#0f1218",
)


def draw_svg(name: str, theme: Theme, size: Size, draw: Callable[[Figure], None]) -> bytes:
    """Return a figure as SVG on a transparent background; the same input gives the same bytes.

    Args:
        name: name of the figure; keeps the ids in this SVG apart from those of other figures.
        draw: draws into the empty figure.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.sans-serif": FONTS,
        "font.size": 9,
        "text.color": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 8.5,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.grid,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size)
        figure.patch.set_alpha(0)
        draw(figure)
        out = io.BytesIO()
        FigureCanvasSVG(figure)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
