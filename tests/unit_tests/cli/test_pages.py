"""``inspect --html`` and ``compare --html``: pictures against what they are drawn from."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_olmo_bridge import synth
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.cli.pages import comparison_page
from megatron_olmo_bridge.inference.difference import States, difference
from megatron_olmo_bridge.inference.jobs import EMBEDDING, FINAL_NORM, LOGITS

PICTURE = re.compile(
    r'<article><h3>(.*?)</h3>.*?<svg class="[^"]*" viewBox="0 0 (\d+) (\d+)".*?>(.*?)</svg>'
    r"<ul>(.*?)</ul></article>"
)
RECTANGLE = re.compile(
    r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)" style="fill: (.*?)">'
    r"<title>(.*?)</title>"
)


def inspect(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["inspect", *map(str, args)])
    return done.exit_code, done.output


@pytest.mark.parametrize("model", ["olmo2-tiny", "olmoe-tiny", "gpt2-tiny"])
def test_each_kind_of_parameter_is_drawn_with_all_its_regions(model: str, tmp_path: Path) -> None:
    hf, file = synth(model, tmp_path / "hf"), tmp_path / "mapping.html"
    code, output = inspect(hf, "--html", file)
    assert code == 0, output
    page = file.read_text()
    pictures = PICTURE.findall(page)
    expected = [p for p in open_checkpoint(hf).mapping.parameters.values() if not any(p.index)]
    assert sorted(name for name, *_ in pictures) == sorted(p.pattern for p in expected)
    by_pattern = {p.pattern: p for p in expected}
    for name, width, height, inside, legend in pictures:
        rectangles = RECTANGLE.findall(inside)
        placements = by_pattern[name].placements
        assert len(rectangles) == len(placements)
        assert sum(int(w) * int(h) for _, _, w, h, *_ in rectangles) == int(width) * int(height)
        for (x, y, *_, color, title), placement in zip(rectangles, placements, strict=True):
            region = placement.megatron_region
            assert (int(x), int(y)) == (region.left, region.top)
            assert unescape(title).startswith(f"{region} = ")
            assert f"background: {color}" in legend


def test_query_groups_are_interleaved(tiny_hf: Path, tmp_path: Path) -> None:
    inspect(tiny_hf, "--html", tmp_path / "a.html")
    pictures = {
        name: inside for name, _, _, inside, _ in PICTURE.findall((tmp_path / "a.html").read_text())
    }
    qkv = RECTANGLE.findall(pictures["decoder.layers.*.self_attention.linear_qkv.weight"])
    assert [color for *_, color, _ in qkv] == ["var(--c0)", "var(--c1)", "var(--c2)"] * 4
    fc1 = RECTANGLE.findall(pictures["decoder.layers.*.mlp.linear_fc1.weight"])
    assert ["gate_proj" in fc1[0][-1], "up_proj" in fc1[1][-1]] == [True, True]


def test_rows_of_padding_are_drawn(tiny_hf: Path, tmp_path: Path) -> None:
    arguments = ["import", tiny_hf, tmp_path / "m", "--make-vocab-size-divisible-by", "3000"]
    assert CliRunner().invoke(app, [*map(str, arguments)]).exit_code == 0
    inspect(tmp_path / "m", "--html", tmp_path / "a.html")
    assert "padding: zeros" in (tmp_path / "a.html").read_text()


def test_a_page_needs_no_network_and_replaces_a_page(tiny_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    file.write_text("old")
    assert inspect(tiny_hf, "--html", file)[0] == 0
    page = file.read_text()
    assert page.startswith("<!doctype html>") and "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://|<script|<link", page)
    assert [f.name for f in tmp_path.iterdir()] == ["a.html"]


def test_only_a_page_is_replaced(tiny_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("weights")
    code, output = inspect(tiny_hf, "--html", file)
    assert code == 2 and "a page's name ends in .html" in " ".join(output.split())
    assert file.read_text() == "weights"
    code, output = inspect(tiny_hf, "--html", tmp_path / "none/a.html")
    assert code == 2 and "no such folder" in " ".join(output.split())


STATES = (EMBEDDING, "layer 0", "layer 1", FINAL_NORM, LOGITS)


@pytest.mark.parametrize(("wrong_from", "verdict"), [
    (5, "The same, but for rounding"), (2, "They part at layer 1"),
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
    colors = ["var(--c4)" if i >= wrong_from else "var(--c0)" for i in range(len(STATES))]
    assert [color for _, color in bars] == colors
