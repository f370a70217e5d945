"""Checkpoints of OLMo's first trainer, written by itself (olmo_trainer/make_checkpoints.py)."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, verify
from megatron_olmo_bridge.cli.app import app

ARCHIVE = Path(__file__).parent / "olmo_trainer" / "checkpoints.tar.xz"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a checkpoint of each kind. Read-only."""
    folder = tmp_path_factory.mktemp("olmo-trainer")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("kind", ["olmo2", "olmo"])
def test_logits_are_those_of_the_trainer(steps: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    export_checkpoint(steps / kind, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    expected = torch.load(steps / kind / "logits.pt")
    with torch.no_grad():
        logits = model.eval()(input_ids=expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)


def test_fused_rows_are_q_k_v_and_up_gate(steps: Path, tmp_path: Path) -> None:
    export_checkpoint(steps / "olmo2", tmp_path / "hf")
    exported = load_file(tmp_path / "hf/model.safetensors")
    stored = torch.load(steps / "olmo2/model.pt")
    names = {"att_proj": [f"self_attn.{x}_proj" for x in "qkv"],
             "ff_proj": ["mlp.up_proj", "mlp.gate_proj"]}  # fmt: skip
    for fused, parts in names.items():
        for layer in range(2):
            rows = [exported[f"model.layers.{layer}.{part}.weight"] for part in parts]
            name = f"transformer.blocks.{layer}.{fused}.weight"
            assert torch.equal(torch.cat(rows), stored[name])


def test_both_formats_and_megatron_hold_the_same(steps: Path, tmp_path: Path) -> None:
    assert verify(steps / "olmo2", steps / "olmo2-safetensors").equal
    for kind in ("olmo2", "olmo"):
        import_checkpoint(steps / kind, tmp_path / kind)
        assert verify(steps / kind, tmp_path / kind).equal


# ------------------------------------------------------------------------------- bad input


def with_setting(name: str, value: object) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        config = yaml.safe_load((step / "config.yaml").read_text())
        config["model"][name] = value
        (step / "config.yaml").write_text(yaml.safe_dump(config))

    return change


def without_tensor(step: Path) -> None:
    weights = torch.load(step / "model.pt")
    del weights["transformer.blocks.1.att_proj.weight"]
    torch.save(weights, step / "model.pt")


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('ran', 'w')",)


def hostile_name(step: Path) -> None:
    """A name of a tensor is a pickle: here one that would write a file."""
    key = base64.urlsafe_b64encode(pickle.dumps(((_Runs(),), False))).decode()
    header = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (step / "model.pt").unlink()
    data = struct.pack("<Q", len(header)) + header + bytes(4)
    (step / "model.safetensors").write_bytes(data)


FAULTS = {
    "alibi": (with_setting("alibi", True), "model.alibi is true: not converted"),
    "gelu": (with_setting("activation_type", "gelu"), 'model.activation_type is "gelu"'),
    "pre-norm with rms": (with_setting("norm_after", False), 'model.layer_norm_type is "rms"'),
    "no width": (with_setting("d_model", None), "d_model in model must be"),
    "missing tensor": (without_tensor, "transformer.blocks.1.att_proj.weight"),
    "hostile name": (hostile_name, "eval"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_message_and_nothing_is_written(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    change, says = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(steps / "olmo2", tmp_path / "step")
    change(tmp_path / "step")
    done = CliRunner().invoke(app, ["import", str(tmp_path / "step"), str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
