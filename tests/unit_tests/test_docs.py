"""What the documentation shows is what there is."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

import megatron_olmo_bridge
from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.models.families import bridges

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_olmo_bridge"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        ROOT / "recipes" / "README.md",
    ]
)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_diff_of_adding_a_family_matches_the_files() -> None:
    text = (ROOT / "docs/adding-a-family.md").read_text()
    new = re.findall(r"```diff\n--- /dev/null\n\+\+\+ b/(\S+)\n@@.*@@\n((?:\+.*\n)+)```", text)
    assert [Path(file).name for file, _ in new] == ["bridge.py", "provider.py", "post_norm_moe.py"]
    for file, lines in new:
        shown = "".join(line.removeprefix("+") + "\n" for line in lines.splitlines())
        assert shown == (ROOT / file).read_text(), f"{file} has changed: show it anew"
    (line,) = re.findall(r'\+(    "\w+": "\w+Bridge",\n)', text)
    assert line in (ROOT / "src/megatron_olmo_bridge/models/families.py").read_text()


def test_the_documented_limits_match_the_code() -> None:
    text = (ROOT / "docs/security.md").read_text()
    rows = re.findall(r"^\| .+ \| ([\d,]+)( [KM]iB)? \| `(\S+)\.(\w+)` \|$", text, re.MULTILINE)
    units = {"": 1, " KiB": 1 << 10, " MiB": 1 << 20}
    stated = {
        (module, name): int(n.replace(",", "")) * units[unit] for n, unit, module, name in rows
    }
    code = {place: getattr(import_module(f"{PACKAGE}.{place[0]}"), place[1]) for place in stated}
    assert stated == code
    limit = re.compile(r"[A-Z_]+_LIMIT|MAX_[A-Z_]+")
    files = {("formats.files", n) for n in vars(import_module(f"{PACKAGE}.formats.files"))}
    assert {place for place in files if limit.fullmatch(place[1])} <= set(stated)


def test_tests_named_on_the_page_on_threats_exist() -> None:
    text = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"`((?:functional_tests|unit_tests|fuzz)/\S*?)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []


# -------------------------------------------------------------------------- links, code, commands


def without_code(text: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_follow_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What `compare` allows, in 16 bits\n```\n# no heading\n```\n")
    assert anchors(page) == {"what-compare-allows-in-16-bits"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith(("https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=name_of)
def test_python_blocks_compile_and_their_imports_exist(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                for alias in node.names:
                    assert hasattr(import_module(str(node.module)), alias.name), alias.name


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each ``olmo-bridge`` command of a page: in blocks, and in sentences."""
    joined = re.sub(r"\\\n\s*", " ", text)
    blocks = re.sub(r"^    ", "", joined, flags=re.MULTILINE)
    module = r"(?:\S+ )*-m megatron_olmo_bridge"
    lines = re.findall(rf"^(?:olmo-bridge|{module}) ([^`\n]+)$", blocks, re.MULTILINE)
    lines += re.findall(r"`olmo-bridge ([^`]+)`", without_code(joined))
    for line in lines:
        words = shlex.split(line, comments=True)
        yield words[: next((i for i, word in enumerate(words) if word in ("|", ">", "||")), None)]


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    text = (
        "```\nolmo-bridge verify a b \\\n    --json | jq .  # why\n```\nSee `olmo-bridge doctor`.\n"
    )
    assert list(commands(text)) == [["verify", "a", "b", "--json"], ["doctor"]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    for name, *words in commands(page.read_text()):
        if name.startswith("-") or name.isupper():  # olmo-bridge COMMAND --help
            continue
        assert name in COMMANDS, name
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        options |= {"--help"}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options, f"{name}: {given - options}"


def test_the_glossary_explains_each_term_once_in_a_sentence() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    _, *sections = re.split(r"^\| term \| meaning \|\n\|---\|---\|\n", text, flags=re.MULTILINE)
    seen: set[str] = set()
    for section in sections:
        rows = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)
        assert [term for term, meaning in rows if not meaning.endswith(".")] == []
        terms = [term for term, _ in rows]
        assert terms == sorted(terms, key=lambda term: term.strip("`.").lower())
        assert len(seen | set(terms)) == len(seen) + len(terms), "a term is explained twice"
        seen |= set(terms)
    assert {"placement", "post-norm", "tracker", "`torch_dist`"} < seen


# ------------------------------------------------------------- what the site draws from the source


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    return import_module("drawn")


def test_pages_have_a_marker_for_each_drawing(drawn: Any) -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert {comment: pages.count(comment) for comment in drawn.DRAWN} == dict.fromkeys(
        re.findall("<!--.*?-->", pages), 1
    )


def test_the_mapping_tables_show_each_family(drawn: Any) -> None:
    text = drawn.mapping_tables().replace("<wbr>", "").replace("&#42;", "*")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [b.family for b in bridges()]
    assert "<code>decoder.layers.*.self_attention.linear_qkv.weight</code> | [256, 128]" in text
    assert "<code>model.layers.*.self_attn.k_proj.weight</code>" in text


def test_the_reference_lists_each_public_name(drawn: Any) -> None:
    text = drawn.public_names().removesuffix(drawn.CONFIG_SECTIONS)
    shown = re.findall(r"^::: (.+)\.(\w+)$", text, re.MULTILINE)
    assert {name for _, name in shown} == set(megatron_olmo_bridge.__all__) - {"__version__"}
    assert all(hasattr(import_module(module), name) for module, name in shown)


def test_drawing_needs_no_torch() -> None:
    code = "import drawn, sys; [draw() for draw in drawn.DRAWN.values()]; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "docs" / "site",
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "megatron", "transformers"} & set(done.stdout.split())


def test_the_picture_shows_each_package_without_implied_arrows(drawn: Any) -> None:
    rooms = drawn.rooms
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert rooms.direct(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert rooms.rows(graph) == {"a": 2, "b": 1, "c": 0}
    packages = rooms.imports(ROOT / "src" / PACKAGE)
    assert "formats" in packages["storage"]
    assert all(f">{package}/</text>" in drawn.picture_of_rooms() for package in packages)
