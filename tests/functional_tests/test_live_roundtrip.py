"""`roundtrip`: the whole way there and back, at a parallel layout."""

import json
import subprocess
import sys
from pathlib import Path

from megatron_olmo_bridge import synth


def roundtrip(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "megatron_olmo_bridge", "roundtrip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_nothing_is_lost(tmp_path: Path) -> None:
    hf = synth("olmo2-tiny", tmp_path / "hf", dtype="bfloat16")
    done = roundtrip(hf, "--tp", 2, "--work", tmp_path, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert len(found["steps"]) == 5
    assert found["steps"][1]["result"] == "47 tensors equal, bit for bit"
    assert found["steps"][3]["result"] == "47 tensors equal, bit for bit"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]  # the copies are gone


def test_no_checkpoint(tmp_path: Path) -> None:
    done = roundtrip(tmp_path)

    assert done.returncode == 2
    assert "not a checkpoint" in done.stderr
