"""Stock Megatron trains an import, and `export` returns the trained weights.

Each test imports, loads with stock megatron-core, takes one optimizer step, saves with stock
megatron-core, and exports. Only stock code handles the weights in between. The expected result is
that of the same step in transformers.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from launching import TOKENS, olmo_bridge, run_script, stock, tokens_argument
from live_layouts import hf_tensors, labels_of, relative_error, worst
from slow import slow_but
from torch.nn.functional import cross_entropy
from transformers import Olmo2ForCausalLM

from megatron_olmo_bridge import inspect, synth

LEARNING_RATE, DECAY, CLIP = 1e-2, 0.1, 1.0
"""Settings of the step in ``stock_megatron.py``; a first step doesn't depend on the betas."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("olmo2-tiny", tmp_path_factory.mktemp("hf") / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def imported(hf: Path) -> Path:
    done = olmo_bridge("import", hf, hf.parent / "megatron")
    assert done.exit_code == 0, done.output
    return hf.parent / "megatron"


@cache
def one_step(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Take the same step in plain PyTorch; return the new weights and the clipped gradients.

    Weight decay follows megatron-core's own rule: everything except vectors.
    """
    model = Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = torch.tensor(TOKENS)
    cross_entropy(model(batch).logits.flatten(0, 1), labels_of(batch).flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
    ]
    torch.optim.AdamW(groups, lr=LEARNING_RATE).step()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model.state_dict(), gradients


def assert_one_step(hf: Path, exported: Path) -> None:
    """Check that the export is the imported model after exactly one step."""
    before, after = hf_tensors(hf), hf_tensors(exported)
    expected, gradients = one_step(hf)
    assert after.keys() == before.keys() == gradients.keys()
    moved = {
        name: relative_error(after[name] - start, expected[name] - start)
        for name, start in before.items()
    }
    name, error = worst(moved)
    # Adam's first step goes by a gradient's sign: where that is more than rounding, each single
    # value must be right.
    single = {
        name: float((after[name] - expected[name])[gradients[name].abs() > 1e-5].abs().max())
        for name in before
        if (gradients[name].abs() > 1e-5).any()
    }
    tensor, largest = worst(single)
    print(f"updates differ by {error:.1e} ({name}), a value by {largest:.1e} ({tensor})")
    assert error <= 2e-3, name
    assert len(single) == len(before)
    assert largest <= 1e-4 * LEARNING_RATE, tensor


@pytest.mark.parametrize("optimizer", slow_but(["adam"], ["adam", "dp_reshardable"]))
@pytest.mark.parametrize("processes", slow_but([2], [1, 2]), ids=["tp1", "tp2"])
def test_stock_megatron_core_trains_an_import(
    hf: Path, imported: Path, tmp_path: Path, processes: int, optimizer: str
) -> None:
    run, exported = tmp_path / "run", tmp_path / "hf"
    stock(
        "save",
        "--hf",
        hf,
        "--checkpoint",
        imported / "iter_0000000",
        "--out",
        run,
        "--optimizer",
        optimizer,
        "--tokens",
        tokens_argument(),
        "--tp",
        processes,
        processes=processes,
    )
    done = olmo_bridge("export", run, exported, "--hf-config", hf)
    assert done.exit_code == 0, done.output

    trained, found = hf_tensors(run), hf_tensors(exported)  # gathered from the model by the script
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    assert olmo_bridge("verify", hf, exported).exit_code == 1
    assert_one_step(hf, exported)


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core has no megatron.training (0.19 for Python 3.12 has)",
)
@pytest.mark.parametrize(
    ("processes", "distributed"), [(1, False), (2, True)], ids=["tp1-adam", "tp2-distributed"]
)
def test_stock_megatron_lm_trains_an_import(
    hf: Path, imported: Path, tmp_path: Path, processes: int, distributed: bool
) -> None:
    """It runs with the flags that `inspect` prints, and `export` needs no other config."""
    flags = [*inspect(imported).megatron_flags, "--tensor-model-parallel-size", processes]
    flags += ["--use-distributed-optimizer"] if distributed else []
    run_script(
        "megatron_training_step",
        imported,
        "--tokens",
        tokens_argument(),
        "--out",
        tmp_path / "run",
        "--",
        *flags,
        processes=processes,
    )
    done = olmo_bridge("export", tmp_path / "run", tmp_path / "hf")
    assert done.exit_code == 0, done.output
    assert_one_step(hf, tmp_path / "hf")
