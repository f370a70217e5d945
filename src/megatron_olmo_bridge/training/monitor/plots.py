"""Figures of a training report: curves of a run over tokens and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .drawing import Size, Theme, draw_svg
from .history import RunHistory
from .human import COUNTS, SI, flops, heading, scaled, short, spoken
from .log_file import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]
THIN = 800
"""Maximum number of points drawn of a curve."""
FEW = 60
"""Number of points up to which each is drawn as a dot, without a smoothed curve."""


@dataclass(frozen=True)
class Plot:
    """Figure that is drawn on demand."""

    name: str
    title: str
    summary: str
    """Main numbers of the figure, in a sentence."""
    draw: Callable[[Axes, RunHistory, Theme], None]
    history: RunHistory

    def svg(self, theme: Theme, size: Size) -> bytes:
        """Return the figure as SVG; the same log gives the same bytes."""

        def draw(figure: Figure) -> None:
            axes = figure.add_subplot()
            self._frame(axes)
            self.draw(axes, self.history, theme)
            _marks(axes, self.history, theme)
            _arrange(figure, axes)

        return draw_svg(self.name, theme, size, draw)

    def _frame(self, axes: Axes) -> None:
        """Set up the axes: tokens below, steps above, a light grid."""
        from matplotlib.ticker import MaxNLocator

        axes.patch.set_alpha(0)
        axes.grid(True, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        axes.spines[["top", "right", "left"]].set_visible(False)
        tokens = self.history.facts.tokens_per_step
        last = max(self.history.steps[-1]["step"], 2) * tokens
        axes.set_xlim(-0.012 * last, 1.012 * last)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(_tick())
        axes.xaxis.set_major_locator(MaxNLocator(6))
        above = axes.secondary_xaxis("top", functions=_scaled(1 / tokens))
        above.set_xlabel("steps")
        above.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        above.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        above.tick_params(length=0)
        above.spines["top"].set_visible(False)


def _arrange(figure: Figure, axes: Axes) -> None:
    """Set margins, the same in all figures so that their x axes align, and add the legend."""
    width, height = figure.get_size_inches()
    handles, labels = axes.get_legend_handles_labels()
    columns = int(width / 1.45)
    rows = math.ceil(len(labels) / columns) if len(labels) > 1 else 0
    figure.subplots_adjust(
        left=0.62 / width,
        right=1 - 0.64 / width,
        bottom=0.5 / height,
        top=1 - (0.52 + 0.2 * rows) / height,
    )
    if rows:
        figure.legend(
            handles,
            labels,
            ncols=columns,
            loc="upper left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.4,
        )


def plots(history: RunHistory) -> list[Plot]:
    """Return the figures of a run, in the order of the page; none before the first step."""
    if not history.steps:
        return []
    figures = [
        ("loss", "Loss", _loss_summary, _draw_loss),
        *([("quality", "Evaluation", _quality_summary, _draw_quality)] if history.measures else []),
        ("learning-rate", "Learning rate", _rate_summary, _draw_rate),
        ("gradient-norm", "Gradient norm", _norm_summary, _draw_norm),
        ("throughput", "Throughput", _throughput_summary, _draw_throughput),
    ]
    return [
        Plot(name, title, summary(history), draw, history) for name, title, summary, draw in figures
    ]


# ----------------------------------------------------------------------------------------- figures


def _plot_dots(
    axes: Axes, x: Curve, y: Curve, color: str, label: str, *, size: float = 4, **options: Any
) -> None:
    """Draw a curve with a dot at each point."""
    dots: dict[str, Any] = {"marker": "o", "markersize": size, "linewidth": 1.6}
    axes.plot(x, y, color=color, label=label, **dots, **options)


def _draw_loss(axes: Axes, history: RunHistory, theme: Theme) -> None:
    _measured(axes, history, "loss", theme, "training")
    x, y = _curve(history, history.evaluations, "loss")
    if x.size:
        _plot_dots(axes, x, y, theme.second, "evaluation", zorder=4)
    axes.set_ylabel(history.facts.loss_unit)
    _, losses = _curve(history, history.steps, "loss")
    skipped = losses.size // 20 if losses.size > FEW else 0
    shown = np.concatenate([losses[skipped:], y[1:] if skipped else y])
    shown = shown[np.isfinite(shown)]
    _logarithmic(axes, shown, beyond=2.5)
    if skipped and shown.size and np.nanmax(losses) > 1.1 * shown.max():
        # The first losses are far higher, and would flatten the rest of the curve.
        lowest, highest = shown.min(), shown.max()
        axes.set_ylim(lowest - 0.12 * (highest - lowest), highest + 0.05 * (highest - lowest))


def _draw_quality(axes: Axes, history: RunHistory, theme: Theme) -> None:
    colours = (theme.main, theme.second, theme.mark, theme.bad)
    for number, name in enumerate(history.measures):
        x, y = _curve(history, history.evaluations, name)
        _plot_dots(axes, x, y, colours[number % len(colours)], spoken(name))
    axes.set_ylabel("on held-out texts")


def _draw_rate(axes: Axes, history: RunHistory, theme: Theme) -> None:
    x, y = _curve(history, history.steps, "lr")
    axes.plot(
        *_thin(x, y),
        color=theme.main,
        linewidth=1.8,
        label="learning rate",
        marker="o" if x.size <= FEW else None,
        markersize=3.5,
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")


def _draw_norm(axes: Axes, history: RunHistory, theme: Theme) -> None:
    _measured(axes, history, "grad_norm", theme, "before clipping")
    _logarithmic(axes, _curve(history, history.steps, "grad_norm")[1], beyond=1)
    axes.set_ylabel("L2 norm")
    clip = history.facts.config.get("optimizer", {}).get("clip_grad")
    if clip:
        axes.axhline(clip, color=theme.muted, linewidth=1, linestyle=":", label="clipped above")


def _draw_throughput(axes: Axes, history: RunHistory, theme: Theme) -> None:
    _measured(axes, history, "tokens_per_second", theme, "tokens/s")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_tick())
    axes.set_ylabel("tokens/s")
    per_token = history.facts.flops_per_token
    if per_token > 0:
        right = axes.secondary_yaxis("right", functions=_scaled(per_token))
        right.set_ylabel("model FLOP/s")
        right.yaxis.set_major_formatter(_tick(SI))
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)


def _measured(axes: Axes, history: RunHistory, name: str, theme: Theme, label: str) -> None:
    """Draw the logged values and a smoothed curve."""
    x, y = _curve(history, history.steps, name)
    if x.size <= FEW:
        _plot_dots(axes, x, y, theme.main, label, size=3.5)
        return
    axes.plot(*_thin(x, y), color=theme.faint, linewidth=0.9, label=label)
    axes.plot(*_thin(x, _smoothed(y)), color=theme.main, linewidth=1.8, label="smoothed")


def _marks(axes: Axes, history: RunHistory, theme: Theme) -> None:
    """Mark checkpoints, skipped steps, resumes, and the end of a run that stopped early."""
    tokens = history.facts.tokens_per_step
    below: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}

    def at(kind: str) -> list[float]:
        return [event["step"] * tokens for event in history.events if event["event"] == kind]

    def mark(kind: str, marker: str, color: str, height: float) -> None:
        if where := at(kind):
            y = [height] * len(where)
            axes.plot(where, y, marker, color=color, markersize=4.5, label=kind, **below)

    def cut(label: str, where: list[float], color: str) -> None:
        line: dict[str, Any] = {"color": color, "linewidth": 1.1, "linestyle": "--", "zorder": 1}
        for number, x in enumerate(where):
            axes.axvline(x, label=label if number == 0 else None, **line)

    mark("checkpoint", "^", theme.muted, 0.02)
    mark("skipped", "x", theme.bad, 0.05)
    cut("resumed", at("resumed"), theme.mark)
    stopped = [history.end["step"] * tokens] if history.state == "stopped" else []
    cut("stopped", stopped, theme.bad)


def _logarithmic(axes: Axes, values: Curve, beyond: float) -> None:
    """Make the y axis logarithmic if the largest value is over ``beyond`` times the smallest."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = values[np.isfinite(values) & (values > 0)]
    if values.size < 2 or values.max() <= beyond * values.min():
        return
    axes.set_yscale("log")
    decades = np.log10(values.max() / values.min())
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1.2 else (1.0, 3.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs if decades < 4 else (1.0,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _scaled(factor: float) -> tuple[Any, Any]:
    """Return the functions of a secondary axis in another unit, and back."""
    return lambda value: value * factor, lambda value: value / factor


def _tick(units: tuple[str, ...] = COUNTS) -> Callable[[float, float], str]:
    """Return the formatter of an axis: ``1.5M`` and ``20M``, without trailing zeros."""

    def label(value: float, _: float) -> str:
        digits, unit = scaled(value, units)
        return f"{float(digits):g}{unit}"

    return label


# -------------------------------------------------------------------------------------------- data


def _curve(history: RunHistory, lines: list[Line], name: str) -> tuple[Curve, Curve]:
    """Return tokens so far and the value ``name`` of each line: two arrays [lines], float64."""
    tokens = history.facts.tokens_per_step
    x = np.array([line["step"] * tokens for line in lines], dtype=np.float64)
    return x, np.array([line.get(name, math.nan) for line in lines], dtype=np.float64)


def _thin(x: Curve, y: Curve) -> tuple[Curve, Curve]:
    """Return at most THIN points of a curve, keeping its peaks and its gaps (NaN).

    Of each of THIN / 2 stretches, keep the lowest point, the highest, and the first gap.
    """
    if x.size <= THIN:
        return x, y
    kept = {0, x.size - 1}
    for part in np.array_split(np.arange(x.size), THIN // 2):
        finite = part[np.isfinite(y[part])]
        if finite.size < part.size:
            kept.add(int(part[~np.isfinite(y[part])][0]))
        if finite.size:
            kept |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])}
    index = sorted(kept)
    return x[index], y[index]


def _smoothed(y: Curve) -> Curve:
    """Return the mean of the finite points around each, weighted by a Hann window."""
    weights = np.hanning((y.size // 20 | 1) + 2)
    known = np.isfinite(y)
    sums = np.convolve(np.where(known, y, 0.0), weights, "same")
    return np.where(known, sums / np.convolve(known, weights, "same"), np.nan)


# --------------------------------------------------------------------------------------- summaries


def _loss_summary(history: RunHistory) -> str:
    steps = [line for line in history.steps if np.isfinite(line["loss"])]
    text = "No loss was a number."
    if steps:
        best = min(steps, key=lambda line: line["loss"])
        text = (
            f"From {steps[0]['loss']:.3f} at step {steps[0]['step']:,} to "
            f"{steps[-1]['loss']:.3f} at step {steps[-1]['step']:,}; "
            f"lowest {best['loss']:.3f} at step {best['step']:,}."
        )
    if missing := [line["step"] for line in history.steps if not np.isfinite(line["loss"])]:
        text += f" Not a number at step {missing[0]:,}."
    if history.evaluations:
        last = history.evaluations[-1]
        text += f" Evaluation: {last['loss']:.3f} at step {last['step']:,}."
    return text


def _quality_summary(history: RunHistory) -> str:
    texts = []
    for name in history.measures:
        known = [e for e in history.evaluations if np.isfinite(e.get(name, math.nan))]
        if known:
            values = [line[name] for line in known]
            texts.append(
                f"{heading(name)} {values[-1]:.3f} at step {known[-1]['step']:,}, "
                f"{min(values):.3f} to {max(values):.3f} on the way."
            )
    return " ".join(texts)


def _rate_summary(history: RunHistory) -> str:
    peak = max(history.steps, key=lambda line: line["lr"])
    last = history.steps[-1]["lr"]
    return f"Highest {peak['lr']:.2e} at step {peak['step']:,}; last {last:.2e}."


def _norm_summary(history: RunHistory) -> str:
    known = [line for line in history.steps if np.isfinite(line["grad_norm"])]
    if not known:
        return "Never a number."
    highest = max(known, key=lambda line: line["grad_norm"])
    median = float(np.median([line["grad_norm"] for line in known]))
    return (
        f"Over all parameters. Median {median:.3g}; "
        f"highest {highest['grad_norm']:.3g} at step {highest['step']:,}."
    )


def _throughput_summary(history: RunHistory) -> str:
    figures = history.figures()
    text = f"Median {short(figures['tokens_per_second'])} tokens/s"
    text += f", {flops(figures['flops_per_second'])} of the model"
    if figures["utilisation"] is not None:
        text += f", {figures['utilisation']:.1%} of the peak"
    return f"{text}, on {history.facts.hardware}."
