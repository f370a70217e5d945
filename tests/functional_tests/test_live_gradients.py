"""The gradient of every parameter equals that of transformers at every layout.

Megatron's own code computes it: DDP, pipeline schedule in two microbatches, finalize_model_grads.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from live_layouts import (
    BATCH,
    LAYOUTS,
    MUTANTS,
    VOCABULARY,
    labels_of,
    random_tokens,
    relative_error,
    worst,
)
from torch.nn.functional import cross_entropy, pad
from transformers import Olmo2ForCausalLM

pytest_plugins = ["live_runs"]

TOLERANCE = 1e-5
"""Maximum norm of the difference, relative to the norm of the gradient."""


@cache
def expected(folder: Path, rows: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return transformers' loss, and gradients by name, with a vocabulary padded to ``rows`` rows.

    Like Megatron's loss, this one counts padding rows as tokens with a logit of 0.
    """
    model = Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = random_tokens(*BATCH)
    logits = pad(model(tokens).logits, (0, rows - VOCABULARY))
    loss = cross_entropy(logits.flatten(0, 1), labels_of(tokens).flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def errors(run: Path, gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the relative error of each gradient by name."""
    found = torch.load(run / "gradients.pt")["gradients"]
    assert found.keys() == gradients.keys()
    return {name: relative_error(found[name], gradient) for name, gradient in gradients.items()}


def test_gradients_equal_those_of_transformers(models: Path, layout: str, results: Path) -> None:
    multiple = LAYOUTS[layout].fields.get("make_vocab_size_divisible_by", 1)
    rows = -(-VOCABULARY // multiple) * multiple
    loss, gradients = expected(models / LAYOUTS[layout].model, rows)
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    found = torch.load(results / layout / "gradients.pt")
    assert abs(found["loss"] - loss) <= 1e-5
    name, error = worst(errors(results / layout, gradients))
    # Ranks that hold copies of a parameter must take the same step, or the copies diverge.
    copy, difference = worst(found["copies"])
    print(f"{layout}: largest relative error {error:.1e} ({name}), copies {difference:.1e}")
    assert error <= TOLERANCE, name
    assert difference <= TOLERANCE, copy


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_qk_norms_are_detected(models: Path, with_2: Path, mutant: str) -> None:
    """The gradient check fails clearly on plausible but wrong QK norms."""
    _, gradients = expected(models / "plain", VOCABULARY)
    name, error = worst(errors(with_2 / mutant, gradients))
    print(f"{mutant}: largest relative error {error:.1e} ({name})")
    assert error > 100 * TOLERANCE
