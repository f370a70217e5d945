"""`roundtrip` converts to Megatron and back at a parallel layout without loss."""

import json
from pathlib import Path

import pytest
from launching import olmo_bridge

from megatron_olmo_bridge import synth


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    hf = synth("olmo2-tiny", tmp_path / "hf", dtype="bfloat16")
    done = olmo_bridge("roundtrip", hf, "--tp", 2, "--work", tmp_path, "--json")

    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["result"]
    assert found["equal"]
    assert len(found["steps"]) == 5
    assert found["steps"][1]["result"] == "47 tensors equal, bit for bit"
    assert found["steps"][3]["result"] == "47 tensors equal, bit for bit"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]  # the copies are removed


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    done = olmo_bridge("roundtrip", tmp_path)

    assert done.exit_code == 2
    assert "not a checkpoint" in done.stderr
