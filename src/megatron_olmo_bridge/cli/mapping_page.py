"""Page of ``inspect --html``: a model's blocks, and the regions that its tensors are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.mapping.mappings import WILDCARD
from megatron_olmo_bridge.mapping.placement import Placement, Region
from megatron_olmo_bridge.mapping.registry import Parameter
from megatron_olmo_bridge.training.monitor.human import short
from megatron_olmo_bridge.training.monitor.page import page, tiles

from .pages import STYLE

COLORS = 6
"""Number of legend colors; a parameter consists of at most four tensors."""
LAYER = f"decoder.layers.{WILDCARD}."
OUTLINED = 24
"""Maximum number of regions drawn with outlines; more outlines would hide the regions."""


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
        ("Parameters", short(source.parameter_count), f"{source.parameter_count:,}"),
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
            STYLE,
            f'<header><p class="eyebrow">Mapping</p><h1>{escape(name)}</h1><p class="about">Each '
            "picture is a Megatron parameter, rows from top to bottom; its colors are the Hugging "
            "Face tensors that its regions equal. Point at a region to see which.</p></header>",
            tiles(figures),
            _blocks(groups),
            *(
                f'<section><h2>{title}</h2><div class="parameters">'
                f"{''.join(map(_parameter, shown))}</div></section>"
                for title, shown in groups.items()
                if shown
            ),
        ],
    )


def _blocks(groups: dict[str, list[Parameter]]) -> str:
    """Draw the parameters in the order of the forward pass, each linked to its mapping."""
    drawn = "".join(
        _layers(title, parameters)
        if parameters[0].index
        else "".join(_block(p, p.pattern.removeprefix("decoder.")) for p in parameters)
        for title, parameters in groups.items()
        if parameters
    )
    return (
        "<section><h2>Blocks</h2><p>From the tokens to the logits, each linked to its mapping. A "
        f'dashed block is a norm or a bias.</p><div class="blocks">{drawn}</div></section>'
    )


def _layers(title: str, parameters: list[Parameter]) -> str:
    names = {p: p.pattern.removeprefix(LAYER) for p in parameters}
    inside = ""
    for module, own in groupby(parameters, key=lambda p: names[p].partition(".")[0]):
        if "norm" in module:
            inside += "".join(_block(p, names[p]) for p in own)
        else:
            blocks = "".join(_block(p, names[p].removeprefix(f"{module}.")) for p in own)
            inside += f"<div><b>{module}</b>{blocks}<p>added to the residual</p></div>"
    return f"<div><b>{title}</b>{inside}</div>"


def _block(parameter: Parameter, name: str) -> str:
    vector = ' class="vector"' if len(parameter.shape) == 1 else ""
    return (
        f'<a href="#{parameter.pattern}"{vector}>{escape(name)}<small>{_shape(parameter)}</small>'
        "</a>"
    )


def _shape(parameter: Parameter) -> str:
    return " x ".join(f"{size:,}" for size in parameter.shape)


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
    return (
        f'<article id="{parameter.pattern}"><h3>{parameter.pattern}</h3><p>{_shape(parameter)}</p>'
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
