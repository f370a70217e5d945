"""What the documentation shows is what there is."""

import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_olmo_bridge"


def test_the_diff_of_adding_a_family_is_the_files() -> None:
    text = (ROOT / "docs/adding-a-family.md").read_text()
    new = re.findall(r"```diff\n--- /dev/null\n\+\+\+ b/(\S+)\n@@.*@@\n((?:\+.*\n)+)```", text)
    assert [Path(file).name for file, _ in new] == ["bridge.py", "provider.py", "post_norm_moe.py"]
    for file, lines in new:
        shown = "".join(line.removeprefix("+") + "\n" for line in lines.splitlines())
        assert shown == (ROOT / file).read_text(), f"{file} has changed: show it anew"
    (line,) = re.findall(r'\+(    "\w+": "\w+Bridge",\n)', text)
    assert line in (ROOT / "src/megatron_olmo_bridge/models/families.py").read_text()


def test_the_limits_are_those_of_the_code() -> None:
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


def test_the_page_on_threats_names_tests_that_there_are() -> None:
    text = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"`((?:functional_tests|unit_tests|fuzz)/\S*?)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
