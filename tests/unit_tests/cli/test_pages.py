"""What pages have in common: one file that needs no network and replaces only a page."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from megatron_olmo_bridge.cli.app import app


def inspect(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["inspect", *map(str, args)])
    return done.exit_code, done.output


def test_a_page_needs_no_network_and_replaces_a_page(tiny_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    file.write_text("old")
    assert inspect(tiny_hf, "--html", file)[0] == 0
    page = file.read_text()
    assert page.startswith("<!doctype html>") and "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://|<script|<link", page)
    assert [f.name for f in tmp_path.iterdir()] == ["a.html"]


def test_a_page_needs_an_html_name_and_an_existing_folder(tiny_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("weights")
    code, output = inspect(tiny_hf, "--html", file)
    assert code == 2 and "a page's name ends in .html" in " ".join(output.split())
    assert file.read_text() == "weights"
    code, output = inspect(tiny_hf, "--html", tmp_path / "none/a.html")
    assert code == 2 and "no such folder" in " ".join(output.split())
