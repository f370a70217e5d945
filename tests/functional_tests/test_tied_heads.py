"""A stored head is kept or tied as in transformers, whatever config.json says about tying."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import edit_json, edit_tensors
from launching import olmo_bridge
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_olmo_bridge import (
    average_checkpoints,
    export_checkpoint,
    import_checkpoint,
    synth,
    verify,
)
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import published_sizes

SIZES = [name for name in published_sizes() if name.endswith("-tiny")]
ONE, HEAD = "model.safetensors", "lm_head.weight"
BATCH = torch.arange(16)[None]


@pytest.fixture(scope="module", params=SIZES)
def bridge(request: pytest.FixtureRequest) -> type[ModelBridge]:
    return published_sizes()[request.param]


@pytest.fixture(scope="module")
def untied(bridge: type[ModelBridge], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model with a separate head although its config ties the embeddings. Read-only."""
    size = next(name for name in bridge.sizes if name in SIZES)
    hf = synth(size, tmp_path_factory.mktemp(size) / "hf", dtype="float32")
    edit_json(hf / "config.json", lambda c: c.update(tie_word_embeddings=True))
    edit_tensors(hf / ONE, lambda t: t.update({HEAD: t[bridge.hf_embedding].flip(0) + 0.01}))
    return hf


@pytest.fixture
def tied(untied: Path, bridge: type[ModelBridge], tmp_path: Path) -> Path:
    """The same model with a copy of its embedding stored as its head."""
    folder = Path(shutil.copytree(untied, tmp_path / "tied"))
    edit_tensors(folder / ONE, lambda t: t.update({HEAD: t[bridge.hf_embedding].clone()}))
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(BATCH).logits


def test_a_head_that_differs_from_the_embedding_is_kept(
    untied: Path, tied: Path, tmp_path: Path
) -> None:
    done = olmo_bridge("import", untied, tmp_path / "m")
    assert done.exit_code == 0, done.output
    assert "config.json says that embeddings are tied, but lm_head.weight differs" in " ".join(
        done.output.split()
    )
    export_checkpoint(tmp_path / "m", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "back" / ONE)[HEAD], load_file(untied / ONE)[HEAD])
    assert torch.equal(logits(tmp_path / "back"), logits(untied))
    assert verify(untied, tmp_path / "m").equal
    assert verify(untied, tmp_path / "back").equal
    differing = {d.name for d in verify(untied, tied).differences}
    assert differing == {"share_embeddings_and_output_weights", HEAD}


def test_an_equal_head_stays_tied(tied: Path, tmp_path: Path) -> None:
    import_checkpoint(tied, tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is True
    assert HEAD not in load_file(tmp_path / "back" / ONE)
    assert torch.equal(logits(tmp_path / "back"), logits(tied))
    assert verify(tied, tmp_path / "back").equal


def test_an_average_keeps_the_head(untied: Path, tied: Path, tmp_path: Path) -> None:
    average_checkpoints([untied, untied], tmp_path / "mean")
    assert torch.equal(logits(tmp_path / "mean"), logits(untied))
    done = olmo_bridge("average", untied, tied, tmp_path / "of-two-models")
    assert done.exit_code == 2
    assert "share_embeddings_and_output_weights: False and True" in " ".join(done.output.split())
