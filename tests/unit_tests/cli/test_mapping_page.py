"""``inspect --html``: the pictures against the mapping that they are drawn from."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_olmo_bridge import synth
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.cli.app import app

PICTURE = re.compile(
    r'<article[^>]*><h3>(.*?)</h3>.*?<svg class="[^"]*" viewBox="0 0 (\d+) (\d+)".*?>(.*?)</svg>'
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


def test_padding_rows_are_drawn(tiny_hf: Path, tmp_path: Path) -> None:
    arguments = ["import", tiny_hf, tmp_path / "m", "--make-vocab-size-divisible-by", "3000"]
    assert CliRunner().invoke(app, [*map(str, arguments)]).exit_code == 0
    inspect(tmp_path / "m", "--html", tmp_path / "a.html")
    assert "padding: zeros" in (tmp_path / "a.html").read_text()


def test_the_blocks_stand_in_the_order_of_the_forward_pass(tmp_path: Path) -> None:
    inspect(synth("olmoe-tiny", tmp_path / "hf"), "--html", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    blocks = re.findall(r'<a href="#(.*?)"( class="vector")?>(.*?)<small>', page)
    layer = "decoder.layers.*."
    assert [(name, bool(vector)) for _, vector, name in blocks] == [
        ("embedding.word_embeddings.weight", False),
        ("linear_qkv.layer_norm_weight", True),
        ("linear_qkv.weight", False),
        ("q_layernorm.weight", True),
        ("k_layernorm.weight", True),
        ("linear_proj.weight", False),
        ("pre_mlp_layernorm.weight", True),
        ("router.weight", False),
        ("experts.experts.*.linear_fc1.weight", False),
        ("experts.experts.*.linear_fc2.weight", False),
        ("final_layernorm.weight", True),
        ("output_layer.weight", False),
    ]
    assert blocks[1][0] == f"{layer}self_attention.linear_qkv.layer_norm_weight"
    assert page.count("added to the residual") == 2
    assert all(f'<article id="{target}">' in page for target, *_ in blocks)
