"""``compare --html``: the pictures against the comparison that they are drawn from."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from megatron_olmo_bridge.cli.comparison_page import comparison_page
from megatron_olmo_bridge.inference.difference import States, difference
from megatron_olmo_bridge.inference.jobs import EMBEDDING, FINAL_NORM, LOGITS
from megatron_olmo_bridge.inference.weights import WeightDifference

STATES = (EMBEDDING, "layer 0", "layer 1", FINAL_NORM, LOGITS)


@pytest.mark.parametrize(("wrong_from", "verdict"), [
    (5, "The same, but for rounding"), (2, "They differ from layer 1 on"),
])  # fmt: skip
def test_the_error_of_each_layer_is_drawn(wrong_from: int, verdict: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reference: States = {n: torch.randn(1, 4, 8, generator=generator) for n in STATES}
    model = {
        name: state + (0.5 if i >= wrong_from else 1e-6)
        for i, (name, state) in enumerate(reference.items())
    }
    ids = torch.tensor([[1, 2, 3, 4]])
    found = difference(reference, model, None, ids, "float32", mixture=False)
    page = comparison_page(found, "a <reference>", "a model")
    assert f"<h1>{verdict}</h1>" in page and "a &lt;reference&gt;" in page
    bars = re.findall(r'<rect width="([\d.]+)" height="10" style="fill: (var\(--c\d\))">', page)
    assert len(bars) == len(found.layers) == len(STATES)
    widths = [float(width) for width, _ in bars]
    by_error = sorted(zip((x.error for x in found.layers), widths, strict=True))
    assert [width for _, width in by_error] == sorted(widths)
    assert all(0 <= width <= 100 for width in widths)
    assert "Difference of the weights" not in page, "only the states were compared"
    colors = ["var(--c4)" if i >= wrong_from else "var(--c0)" for i in range(len(STATES))]
    assert [color for _, color in bars] == colors


def test_the_difference_of_each_weight_is_drawn() -> None:
    weights = {
        "embed.weight": 0.0,
        "layers.0.q.weight": 0.0,
        "layers.1.q.weight": 1.0,
        "layers.0.experts.0.fc.weight": 1e-3,
        "layers.0.experts.1.fc.weight": 1e-5,
        "layers.1.experts.0.fc.weight": math.nan,
        "layers.1.experts.1.fc.weight": 0.5,
    }
    ids = torch.tensor([[1, 2, 3, 4]])
    states: States = {name: torch.ones(1, 4, 8) for name in STATES}
    found = replace(
        difference(states, states, None, ids, "float32", mixture=False),
        weights=[WeightDifference(name, value) for name, value in weights.items()],
    )
    page = comparison_page(found, "a", "b")
    cells = re.findall(
        r'<rect x="(\d)" width="1" height="1" style="(.*?)"><title>(.*?)</title>', page
    )
    assert cells == [
        ("0", "fill: var(--line)", "embed.weight: 0"),
        ("0", "fill: var(--line)", "layers.0.q.weight: 0"),
        ("1", "fill: var(--c4); fill-opacity: 1.00", "layers.1.q.weight: 1"),
        ("0", "fill: var(--c4); fill-opacity: 0.68", "layers.0.experts.*.fc.weight: 0.001"),
        ("1", "fill: var(--c4); fill-opacity: 1.00", "layers.1.experts.*.fc.weight: nan"),
    ]
    assert re.findall(r"</svg><span>(\w.*?)</span>", page)[-3:] == ["equal", "1", "nan"]
