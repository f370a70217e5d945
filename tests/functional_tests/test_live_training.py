"""Training a live model gives the losses and final weights of training the transformers model.

Both take five steps of AdamW with OLMo's settings from the same weights on the same tokens.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from live_layouts import (
    BETAS,
    CLIP,
    DECAY,
    EPSILON,
    LEARNING_RATE,
    SEEN,
    hf_tensors,
    labels_of,
    relative_error,
    training_tokens,
    worst,
)
from torch.nn.functional import cross_entropy
from transformers import Olmo2ForCausalLM

pytest_plugins = ["live_runs"]

EMBEDDING = "model.embed_tokens.weight"


@cache
def plain_run(folder: Path) -> dict:
    """Train in plain PyTorch; return losses, gradient norms, and final weights."""
    model = Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    others = [p for name, p in model.named_parameters() if name != EMBEDDING]
    embedding = {"params": [model.model.embed_tokens.weight], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [embedding, {"params": others}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=DECAY,
    )
    losses, norms = [], []
    for tokens in training_tokens():
        loss = cross_entropy(model(tokens).logits.flatten(0, 1), labels_of(tokens).flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def differences(found: list[float], expected: list[float]) -> dict[str, float]:
    pairs = enumerate(zip(found, expected, strict=True))
    return {f"step {i}": abs(a - b) for i, (a, b) in pairs}


def test_the_run_covers_every_feature(models: Path) -> None:
    run = plain_run(models / "plain")
    assert run["losses"][0] - run["losses"][-1] > 0.1, "the model must learn"
    assert max(run["norms"]) > CLIP, "gradients must be clipped"


@pytest.mark.parametrize("optimizer", ["", "-distributed"])
@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "dp2"])
def test_training_equals_that_of_transformers(
    models: Path, layout: str, optimizer: str, results: Path
) -> None:
    run = torch.load(results / f"train-{layout}{optimizer}" / "run.pt")
    expected = plain_run(models / "plain")
    losses, norms = (worst(differences(run[key], expected[key])) for key in ("losses", "norms"))
    # Compare the changes of the weights: weight decay is only a small part of the weights.
    before = hf_tensors(models / "plain")
    assert run["weights"].keys() == before.keys()
    moved = {
        name: relative_error(run["weights"][name] - start, expected["weights"][name] - start)
        for name, start in before.items()
    }
    name, error = worst(moved)
    print(
        f"{layout}{optimizer}: losses differ by {losses[1]:.1e}, norms by {norms[1]:.1e}, "
        f"updates by {error:.1e} ({name})"
    )
    assert losses[1] <= 1e-4, losses[0]
    assert norms[1] <= 1e-3, norms[0]
    assert error <= 0.01, name

    # Rows of tokens that never occur get no gradient, and the embedding has no weight decay.
    unseen = run["weights"][EMBEDDING][SEEN:]
    assert torch.equal(unseen, before[EMBEDDING][SEEN:])


LAYER = {
    "self_attention.linear_proj.weight": DECAY,
    "self_attention.linear_proj.post_layernorm.weight": DECAY,
    "self_attention.linear_qkv.weight": DECAY,
    "self_attention.q_layernorm.weight": DECAY,
    "self_attention.k_layernorm.weight": DECAY,
    "mlp.linear_fc1.weight": DECAY,
    "mlp.linear_fc2.weight": DECAY,
    "mlp.linear_fc2.post_layernorm.weight": DECAY,
}
FIRST = {"embedding.word_embeddings.weight": 0.0}
LAST = {"decoder.final_layernorm.weight": DECAY, "output_layer.weight": DECAY}
TIED_LAST = {"decoder.final_layernorm.weight": DECAY, "output_layer.weight": 0.0}


def of_layers(count: int) -> dict[str, float]:
    return {
        f"decoder.layers.{i}.{name}": decay for i in range(count) for name, decay in LAYER.items()
    }


def test_weight_decay_of_every_parameter(with_1: Path) -> None:
    """OLMo applies weight decay to everything except embeddings, also to norms."""
    (rank,) = json.loads((with_1 / "decays-tp1" / "decays.json").read_text())
    assert rank == FIRST | of_layers(4) | LAST


@pytest.mark.parametrize(("model", "last"), [("pp2", LAST), ("pp2-tied", TIED_LAST)])
def test_weight_decay_of_every_parameter_of_two_stages(
    with_2: Path, model: str, last: dict[str, float]
) -> None:
    """The output layer is decayed too, unless it is a copy of the embedding."""
    ranks = json.loads((with_2 / f"decays-{model}" / "decays.json").read_text())
    assert ranks == [FIRST | of_layers(2), of_layers(2) | last]
