"""Page of ``compare --html``: error by layer, and difference by weight."""

from __future__ import annotations

import math
import re
from html import escape

from megatron_olmo_bridge.inference.difference import Comparison, Layer
from megatron_olmo_bridge.inference.weights import WeightDifference, severity, summarize
from megatron_olmo_bridge.training.monitor.page import page, tiles

from .pages import STYLE


def comparison_page(comparison: Comparison, reference: str, model: str) -> str:
    """Return the page of a comparison: error by layer, and difference by weight."""
    values = [v for x in comparison.layers for v in (x.error, x.allowed) if 0 < v < math.inf]
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))
    bars = "".join(_bar(layer, low, high) for layer in comparison.layers)
    verdict = (
        "The same, but for rounding"
        if comparison.equal
        else f"They differ from {comparison.differs_from} on"
    )
    return page(
        "Comparison",
        [
            STYLE,
            '<header><p class="eyebrow">Comparison</p>'
            f'<h1>{escape(verdict)}</h1><p class="about">{escape(reference)} in transformers, '
            f"{escape(model)} in megatron-core, on {comparison.tokens} tokens in "
            f"{comparison.dtype}</p></header>",
            tiles(
                [
                    (
                        "Error of the logits",
                        f"{comparison.layers[-1].error:.3g}",
                        comparison.measure,
                    ),
                    ("Allowed", f"{comparison.layers[-1].allowed:.3g}", comparison.bound),
                    ("Top-1 agreement", f"{comparison.top1_agreement:.2%}", "likeliest token"),
                    ("KL divergence", f"{comparison.kl_divergence:.3g}", "nats"),
                ]
            ),
            "<section><h2>Error after each layer</h2><p>Logarithmic, from "
            f"1e{low} to 1e{high}: {escape(comparison.measure)}. The line marks the allowed error."
            "</p>"
            f'<div class="errors">{bars}</div></section>',
            *([_weights(comparison.weights)] if comparison.weights else []),
        ],
    )


def _bar(layer: Layer, low: int, high: int) -> str:
    def place(value: float) -> float:
        if not math.isfinite(value):
            return 100
        return 100 * (math.log10(value) - low) / (high - low) if value > 0 else 0

    color = "var(--c4)" if layer.differs else "var(--c0)"
    allowed = f"{place(layer.allowed):.2f}"
    return (
        f"<span>{escape(layer.name)}</span>"
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{layer.error:.3g}, allowed {layer.allowed:.3g}">'
        '<rect width="100" height="10" style="fill: var(--line)"/>'
        f'<rect width="{place(layer.error):.2f}" height="10" style="fill: {color}">'
        f"<title>{layer.error:.3g}, allowed {layer.allowed:.3g}</title></rect>"
        f'<path d="M{allowed} 0V10" style="stroke: var(--ink); stroke-width: 2px; '
        f'vector-effect: non-scaling-stroke"/></svg><span>{layer.error:.2g}</span>'
    )


def _weights(weights: list[WeightDifference]) -> str:
    """Draw a row of cells for each kind of weight, a cell for each layer."""
    rows: dict[str, dict[int, float]] = {}
    for weight in weights:
        layers = re.findall(r"\.(\d+)\.", weight.name)
        cells = rows.setdefault(re.sub(r"\.\d+\.", ".*.", weight.name), {})
        layer = int(layers[0]) if layers else 0
        # A cell shows the worst expert of its layer.
        cells[layer] = max(cells.get(layer, 0.0), weight.relative, key=severity)
    drawn = "".join(_cells(name, cells) for name, cells in rows.items())
    return (
        f"<section><h2>Difference of the weights</h2><p>{escape(summarize(weights))}. A row is a "
        "kind of weight, a cell a layer. The stronger its color, the larger is the norm of the "
        f'difference over the norm of the weight.</p><div class="errors">{drawn}</div></section>'
    )


def _cells(name: str, cells: dict[int, float]) -> str:
    largest = max(cells.values(), key=severity)
    inside = "".join(
        f'<rect x="{layer}" width="1" height="1" style="{_shade(value)}">'
        f"<title>{escape(name.replace('*', str(layer), 1))}: {value:.2g}</title></rect>"
        for layer, value in cells.items()
    )
    return (
        f'<span>{escape(name)}</span><svg class="cells" viewBox="0 0 {len(cells)} 1" '
        f'preserveAspectRatio="none" role="img" aria-label="largest {largest:.2g}">{inside}</svg>'
        f"<span>{f'{largest:.2g}' if largest else 'equal'}</span>"
    )


def _shade(relative: float) -> str:
    """Return the fill: from 1e-8, less than float32 rounds, to 1, as large as the weight."""
    if not relative:
        return "fill: var(--line)"
    place = 1 + math.log10(min(max(relative, 1e-8), 1)) / 8 if relative == relative else 1
    return f"fill: var(--c4); fill-opacity: {0.15 + 0.85 * place:.2f}"
