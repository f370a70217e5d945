"""What a shell completes, by the protocol that its completion script uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_olmo_bridge.models.families import published_sizes

MAIN = """
import sys
from megatron_olmo_bridge.cli import main
sys.argv = ["olmo-bridge"]
try:
    main()
finally:
    assert not {"torch", "numpy", "transformers", "megatron"} & sys.modules.keys()
"""


def completed(*words: object) -> list[str]:
    """Values that bash is offered for the last of these words of a command line."""
    line = ["olmo-bridge", *map(str, words)]
    env = os.environ | {
        "_OLMO_BRIDGE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", MAIN], capture_output=True, text=True, check=True, env=env
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_model_names_are_completed() -> None:
    assert completed("synth", "olmo2-") == [n for n in published_sizes() if n.startswith("olmo2-")]


@pytest.mark.parametrize("command", ["train", "recipes"])
def test_recipe_names_are_completed(command: str) -> None:
    assert completed(command, "olmo3_") == ["olmo3_7b", "olmo3_7b:stage2"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("import", "--dtype", ""), ["keep", "float32", "bfloat16", "float16"]),
        (("export", "--dtype", "b"), ["bfloat16"]),
        (("average", "--dtype", "float"), ["float32", "float16"]),
        (("synth", "--dtype", ""), ["float32", "bfloat16", "float16"]),
        (("compare", "--dtype", "k"), []),
        (("generate", "--dtype", "k"), ["keep"]),
        (("prepare-data", "--txt-documents", ""), ["line", "file"]),
        (("ver",), ["verify"]),
    ],
)
def test_option_values_are_completed(words: tuple[str, ...], values: list[str]) -> None:
    assert completed(*words) == values


def test_iterations_of_the_named_checkpoint_are_completed(tmp_path: Path) -> None:
    for name in ("iter_0000020", "iter_0000100", "release", "iter_0000300.partial"):
        (tmp_path / name).mkdir()
    assert completed("export", tmp_path, "x", "--iteration", "") == ["20", "100", "release", "all"]
    assert completed("inspect", tmp_path, "--iteration", "1") == ["100"]
    assert completed("inspect", tmp_path / "absent", "--iteration", "") == []
    assert completed("export", "--iteration", "") == []
