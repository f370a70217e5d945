"""The report's pictures, as PNG files in memory."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from .metrics import Quality

MOST_WITH_NAMES = 25
"""Classes up to which a confusion matrix shows names and numbers."""
_LABEL_LENGTH, _NAME_LENGTH = 30, 56
"""Characters of a class's name that are shown: beside a row or column, and in a list."""
_PAIRS = 10
"""Pairs that stand below a matrix of many classes."""
_INK, _PALE, _BLUE, _ORANGE = "#1c2430", "#8a95a3", "#2b6cb0", "#dd6b20"


def confusion_picture(name: str, found: Quality) -> bytes:
    """True class by predicted class, each row as shares of its class.

    Few classes have their names, and each cell its number of examples. Many have numbers, and below
    the image are the names of those that are confused most often.
    """
    counts = np.array(found.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    small = len(counts) <= MOST_WITH_NAMES
    side = max(4.5, 0.45 * len(counts) + 2.5) if small else 9.0
    figure = Figure(figsize=(side + 1, side if small else side + 2), layout="constrained")
    axes = figure.add_subplot()
    # By square root: of many classes the mistakes are each a small share, and would be invisible.
    norm = PowerNorm(0.5, 0, 1)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class", color=_INK)
    bar.outline.set_visible(False)
    axes.set_title(
        f"{name}\naccuracy {found.accuracy:.3f}, macro-F1 {found.macro_f1:.3f}",
        loc="left", color=_INK, fontsize=12,
    )  # fmt: skip
    axes.set_xlabel("predicted class" if small else "predicted class, by its number", color=_INK)
    axes.set_ylabel("true class" if small else "true class, by its number", color=_INK)
    axes.spines[:].set_visible(False)
    if small:
        _name_cells(axes, [c.name for c in found.classes], counts, shares)
    elif found.confused:
        number = {c.name: i for i, c in enumerate(found.classes)}
        lines = ["Most often confused (true class, predicted class):"]
        lines += [
            f"{times:>5} times   {number[a]} {_shortened(a)}   \N{RIGHTWARDS ARROW}   "
            f"{number[b]} {_shortened(b)}"
            for a, b, times in found.confused[:_PAIRS]
        ]
        figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=9, color=_INK)
    return _png(figure)


def _shortened(name: str, length: int = _NAME_LENGTH) -> str:
    return textwrap.shorten(name, length, placeholder="\N{HORIZONTAL ELLIPSIS}")


def _name_cells(axes: Axes, names: list[str], counts: np.ndarray, shares: np.ndarray) -> None:
    shown = [_shortened(name, _LABEL_LENGTH) for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), shown)
    axes.tick_params(length=0, labelsize=9)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                color = "white" if shares[i, j] > 0.35 else _INK
                axes.text(j, i, f"{count}", ha="center", va="center", fontsize=9, color=color)


def tradeoff_picture(points: Sequence[tuple[str, float, float]]) -> bytes:
    """Macro-F1 against the median latency of one text.

    Args:
        points: name, milliseconds and macro-F1 of each classifier.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    slowest = max(ms for _, ms, _ in points)
    scores = [f1 for _, _, f1 in points]
    margin = max(0.02, (max(scores) - min(scores)) * 0.4)
    for i, (name, ms, f1) in enumerate(points):
        axes.scatter(ms, f1, s=90, color=(_BLUE, _ORANGE)[i % 2], zorder=3)
        left = ms > slowest * 0.6  # the name has no room on the right
        above = f1 == max(scores) if max(scores) > min(scores) else i % 2 == 0
        axes.annotate(
            f"{name}\n{f1:.3f} at {ms:.3g} ms", (ms, f1), textcoords="offset points",
            xytext=(6 if left else -6, 10 if above else -10), ha="right" if left else "left",
            va="bottom" if above else "top", color=_INK,
        )  # fmt: skip
    axes.set_xlim(0, slowest * 1.15)
    axes.set_ylim(max(0, min(scores) - margin), max(scores) + margin)
    axes.set_xlabel("median latency of one text, ms", color=_INK)
    axes.set_ylabel("macro-F1 on held-out texts", color=_INK)
    axes.set_title("Quality against latency: the upper left is better", loc="left", color=_INK)
    axes.grid(color="#e6eaef", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
