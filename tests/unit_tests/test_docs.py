"""What the documentation shows is what there is."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_diff_of_adding_a_family_is_the_files() -> None:
    text = (ROOT / "docs/adding-a-family.md").read_text()
    new = re.findall(r"```diff\n--- /dev/null\n\+\+\+ b/(\S+)\n@@.*@@\n((?:\+.*\n)+)```", text)
    assert [Path(file).name for file, _ in new] == ["bridge.py", "provider.py", "post_norm_moe.py"]
    for file, lines in new:
        shown = "".join(line.removeprefix("+") + "\n" for line in lines.splitlines())
        assert shown == (ROOT / file).read_text(), f"{file} has changed: show it anew"
    (families,) = re.findall(r"\+(FAMILIES = .*)\n", text)
    assert families in (ROOT / "src/megatron_olmo_bridge/models/bridge.py").read_text()
