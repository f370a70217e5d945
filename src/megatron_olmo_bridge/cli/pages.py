"""Self-contained HTML pages of ``inspect --html`` and ``compare --html``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.mapping.mappings import WILDCARD
from megatron_olmo_bridge.mapping.placement import Placement, Region
from megatron_olmo_bridge.mapping.registry import Parameter
from megatron_olmo_bridge.storage.atomic import replace_file
from megatron_olmo_bridge.training.monitor.human import short
from megatron_olmo_bridge.training.monitor.page import page, tiles

if TYPE_CHECKING:
    from megatron_olmo_bridge.inference.difference import Comparison, Layer

COLORS = 6
"""Number of legend colors; a parameter consists of at most four tensors."""
OUTLINED = 24
"""Maximum number of regions drawn with outlines; more outlines would hide the regions."""
_STYLE = """<style>
:root { --c0: #2557c7; --c1: #d97706; --c2: #0f8a5f; --c3: #7a3fc0; --c4: #c4262e; --c5: #667085 }
@media (prefers-color-scheme: dark) {
  :root { --c0: #84abff; --c1: #ffb45c; --c2: #5fd3a4; --c3: #c59bff; --c4: #ff8b85; --c5: #97a1b3 }
}
.parameters { display: grid; gap: 1.5rem 1.25rem; margin-top: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
article { min-width: 0; }
h3 { font: 600 .85rem ui-monospace, monospace; margin: 0; overflow-wrap: anywhere; }
article p, article li { color: var(--muted); font-size: .82rem; }
svg { display: block; width: 100%; height: 11rem; margin: .5rem 0; }
svg.whole { height: 3rem; }
svg.vector { height: 1rem; }
rect { vector-effect: non-scaling-stroke; }
svg.outlined rect { stroke: var(--card); stroke-width: 1px; }
rect:hover { opacity: .7; }
ul { list-style: none; margin: 0; padding: 0; }
li { display: flex; align-items: baseline; gap: .45em; overflow-wrap: anywhere; }
.errors { display: grid; grid-template-columns: auto minmax(4rem, 1fr) auto; gap: .3rem .9rem;
  align-items: center; margin-top: .9rem; font-size: .88rem; font-variant-numeric: tabular-nums; }
.errors svg { height: .8rem; margin: 0; }
i { flex: none; width: .8em; height: .8em; border-radius: 2px; }
</style>"""


def write_page(file: Path, text: str) -> None:
    """Write a page whole, in place of one of the same name.

    Raises:
        OutputError: The file can't be written.
    """
    try:
        replace_file(file, text)
    except OSError as error:
        raise OutputError(f"{file}: can't be written: {error.strerror}") from error


def check_page(file: Path | None) -> None:
    """Refuse a page's name before any work is done.

    Raises:
        InputError: the name doesn't end in ``.html``, so it may be a checkpoint's file.
        OutputError: There is no such folder.
    """
    if file is None:
        return
    if file.suffix != ".html":
        raise InputError(f"--html {file}: a page's name ends in .html")
    if not file.parent.is_dir():
        raise OutputError(f"--html {file}: no such folder: {file.parent}")


def mapping_page(source: Checkpoint) -> str:
    """Return the page that draws a checkpoint's mapping.

    All layers and experts are mapped alike, so only the first of each is shown.
    """
    bridge = source.bridge
    name = bridge.size_name() or f"{bridge.family} model"
    parameters = [p for p in source.mapping.parameters.values() if not any(p.index)]
    numbers, padded = bridge.config_values, source.padded_vocab_size
    padding = f"padded to {padded:,}" if padded != bridge.vocab_size else "not padded"
    figures = [
        ("Parameters", short(source.parameters), f"{source.parameters:,}"),
        ("Layers", f"{numbers['num_layers']}", f"hidden size {numbers['hidden_size']:,}"),
        (
            "Attention heads",
            f"{numbers['num_attention_heads']}",
            f"{numbers.get('num_query_groups', numbers['num_attention_heads'])} query groups",
        ),
        ("Vocabulary", f"{bridge.vocab_size:,}", padding),
    ]
    if experts := numbers.get("num_moe_experts"):
        figures.append(("Experts", f"{experts}", f"{numbers['moe_router_topk']} for each token"))
    groups = {
        "Before the layers": [p for p in parameters if p.name.startswith("embedding.")],
        f"Each of {numbers['num_layers']} layers": [p for p in parameters if p.index],
    }
    groups["After the layers"] = [
        p for p in parameters if not any(p in shown for shown in groups.values())
    ]
    return page(
        f"{name} · mapping",
        [
            _STYLE,
            f'<header><p class="eyebrow">Mapping</p><h1>{escape(name)}</h1><p class="about">Each '
            "picture is a Megatron parameter, rows from top to bottom; its colors are the Hugging "
            "Face tensors that its regions equal. Point at a region to see which.</p></header>",
            tiles(figures),
            *(
                f'<section><h2>{title}</h2><div class="parameters">'
                f"{''.join(map(_parameter, shown))}</div></section>"
                for title, shown in groups.items()
                if shown
            ),
        ],
    )


def _parameter(parameter: Parameter) -> str:
    whole = Region.whole(parameter.shape)
    colors: dict[str, int] = {}
    for placement in parameter.placements:
        colors.setdefault(_hf_name(placement, parameter), len(colors) % COLORS)
    legend = "".join(
        f'<li><i style="background: var(--c{color})"></i>{escape(name)}</li>'
        for name, color in colors.items()
    )
    count = len(parameter.placements)
    kind = "" if count > 1 else "vector" if len(parameter.shape) == 1 else "whole"
    if count <= OUTLINED:
        kind += " outlined"
    shape = " x ".join(f"{size:,}" for size in parameter.shape)
    return (
        f"<article><h3>{escape(parameter.pattern)}</h3><p>{shape}</p>"
        f'<svg class="{kind.strip()}" viewBox="0 0 {whole.right} {whole.bottom}" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(parameter.pattern)}">'
        f"{''.join(_rectangles(parameter, colors))}</svg><ul>{legend}</ul></article>"
    )


def _rectangles(parameter: Parameter, colors: dict[str, int]) -> Iterator[str]:
    for placement in parameter.placements:
        name, region = _hf_name(placement, parameter), placement.megatron_region
        transposed = ", transposed" if placement.transposed else ""
        yield (
            f'<rect x="{region.left}" y="{region.top}" width="{region.columns}" '
            f'height="{region.rows}" style="fill: var(--c{colors[name]})">'
            f"<title>{region} = {escape(name)} {placement.hf_region}{transposed}</title></rect>"
        )


def _hf_name(placement: Placement, parameter: Parameter) -> str:
    """Return the tensor's name with ``*`` in place of the layer and expert, as in the pattern."""
    if placement.hf_name is None:
        return "padding: zeros"
    return placement.hf_name.replace(".0.", f".{WILDCARD}.", len(parameter.index))


def comparison_page(comparison: Comparison, reference: str, model: str) -> str:
    """Return the page of a comparison: the error after each layer beside the allowed error."""
    values = [v for x in comparison.layers for v in (x.error, x.allowed) if 0 < v < math.inf]
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))
    bars = "".join(_bar(layer, low, high) for layer in comparison.layers)
    verdict = (
        "The same, but for rounding" if comparison.equal else f"They part at {comparison.parts_at}"
    )
    return page(
        "Comparison",
        [
            _STYLE,
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
        ],
    )


def _bar(layer: Layer, low: int, high: int) -> str:
    def place(value: float) -> float:
        if not math.isfinite(value):
            return 100
        return 100 * (math.log10(value) - low) / (high - low) if value > 0 else 0

    color = "var(--c4)" if layer.parts else "var(--c0)"
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
