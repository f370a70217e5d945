"""Hugging Face to Megatron and back: the same bits, the same config, the same logits."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from slow import slow_but

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, synth, verify
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions

SAME_LOGITS = Path(__file__).parents[2] / "examples/same_logits.py"


def tensor_hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                tensor = shard.get_tensor(name)
                described = f"{tensor.dtype} {list(tensor.shape)} ".encode()
                raw = tensor.view(-1).view(dtype=torch.uint8).numpy()
                hashes[name] = hashlib.sha256(described + raw.tobytes()).hexdigest()
    return hashes


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16", "float16"]))
@pytest.mark.parametrize("size", ["olmo2-tiny", pytest.param("olmo2-1b", marks=pytest.mark.slow)])
def test_nothing_is_lost(tmp_path: Path, size: str, dtype: str) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    synth(size, hf, dtype=dtype, max_shard_size="1MB" if size == "olmo2-tiny" else "2GB")
    import_checkpoint(hf, megatron)
    assert verify(hf, megatron).equal
    export_checkpoint(megatron, back)
    assert verify(hf, back).equal and verify(megatron, back).equal

    assert tensor_hashes(back) == tensor_hashes(hf)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (hf, back)]
    assert configs[0] == configs[1]
    # Loads both in transformers; fails on a missing or unexpected tensor, or different logits.
    done = subprocess.run(
        [sys.executable, str(SAME_LOGITS), str(hf), str(back)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(f"{size} {dtype}: {done.stdout.strip()}")


def test_a_change_of_dtype_and_back_equals_that_of_torch(tmp_path: Path) -> None:
    """bfloat16 to float32 is lossless, and converting back gives the source bit for bit."""
    synth("olmo2-tiny", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "wide", ImportOptions(dtype="float32"))
    export_checkpoint(tmp_path / "wide", tmp_path / "back", ExportOptions(dtype="bfloat16"))
    assert {d.kind for d in verify(tmp_path / "hf", tmp_path / "wide").differences} == {"dtype"}
    assert verify(tmp_path / "hf", tmp_path / "back").equal
