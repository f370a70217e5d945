"""The figures of a classifier's report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from megatron_olmo_bridge.tasks.classification.metrics import Quality
from megatron_olmo_bridge.training.monitor.drawing import Size, Theme, draw_svg

MOST_WITH_NAMES = 25
"""Classes up to which a confusion matrix shows names and numbers."""
_LABEL_LENGTH = 30
"""Characters of a class's name that are shown beside a row or column."""


def confusion_sizes(classes: int) -> tuple[Size, Size]:
    """Return the sizes of a confusion matrix for a wide and a narrow screen."""
    side = min(9.4, 0.45 * classes + 3) if classes <= MOST_WITH_NAMES else 9.4
    return (9.4, side), (4.6, max(4.6, 0.5 * side))


def confusion_svg(name: str, found: Quality, theme: Theme, size: Size) -> bytes:
    """Draw true class by predicted class, each row as shares of its class.

    With few classes the rows have names and each cell its number of examples; with many, rows and
    columns are numbered in the order of the classes.
    """
    counts = np.array(found.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(counts) <= MOST_WITH_NAMES

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("shares", [theme.grid, theme.main])
        # By square root: of many classes the mistakes are each a small share, and would vanish.
        image = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 1), aspect="auto")
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
        axes.set_xlabel("predicted class" if named else "predicted class, by number")
        axes.set_ylabel("true class" if named else "true class, by number")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if named:
            _name_cells(axes, [c.name for c in found.classes], counts, shares, theme)

    return draw_svg(f"confusion-{name}", theme, size, draw)


def _name_cells(
    axes: Axes, names: list[str], counts: np.ndarray, shares: np.ndarray, theme: Theme
) -> None:
    shown = [textwrap.shorten(name, _LABEL_LENGTH, placeholder="…") for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), shown)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                colour = theme.on_main if shares[i, j] > 0.25 else theme.ink
                axes.text(j, i, f"{count}", ha="center", va="center", fontsize=8.5, color=colour)


def tradeoff_svg(
    points: Sequence[tuple[str, float, float]], measure: str, theme: Theme, size: Size
) -> bytes:
    """Draw a measure of quality against the median latency of one text.

    Args:
        points: Name, milliseconds and measure of each classifier.
        measure: Its name, for people.
    """
    slowest = max(ms for _, ms, _ in points)
    scores = [score for _, _, score in points]
    margin = max(0.02, (max(scores) - min(scores)) * 0.6)

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for i, (name, ms, score) in enumerate(points):
            axes.scatter(ms, score, s=80, color=(theme.main, theme.second)[i % 2], zorder=3)
            left = ms > slowest * 0.6  # the name has no room on the right
            above = score == max(scores) if max(scores) > min(scores) else i % 2 == 0
            axes.annotate(
                f"{name}\n{score:.3f} at {ms:.3g} ms",
                (ms, score),
                textcoords="offset points",
                xytext=(6 if left else -6, 10 if above else -10),
                ha="right" if left else "left",
                va="bottom" if above else "top",
            )
        axes.set_xlim(0, slowest * 1.15)
        lowest = min(scores) - margin
        axes.set_ylim(max(0, lowest) if min(scores) >= 0 else lowest, max(scores) + margin)
        axes.set_xlabel("median latency of one text, ms")
        axes.set_ylabel(f"{measure} on held-out texts")
        axes.grid(True, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)

    return draw_svg("tradeoff", theme, size, draw)
