"""A run gives the same losses at every layout as a plain training loop in transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

import torch
from training_runs import Curve, Place, Run, apart
from transformers import AutoModelForCausalLM

from megatron_olmo_bridge.training.recipes import apply_overrides, load_recipe
from megatron_olmo_bridge.training.token_data import TokenData

LAYOUTS = {
    "tp": (2, "parallel.tp=2", "train.micro_batch_size=4"),
    "sp": (2, "parallel.tp=2", "parallel.sp=true", "train.micro_batch_size=4"),
    "pp": (2, "parallel.pp=2"),
    "vpp": (2, "parallel.pp=2", "parallel.vpp=2"),
    "dp": (2,),
    "micro-batch": (1, "train.micro_batch_size=1"),
    "recompute": (1, "parallel.recompute=full"),
}
BATCH, WARMUP, CLIP = 4, 4, 2.0
GENTLE = ("train.steps=50", "optimizer.lr=3e-4", "optimizer.z_loss=1e-3")
HARSH = {"lr": 3e-3, "weight_decay": 3.0, "z_loss": 1e-2}
"""Overrides that make each of these settings visible within ten steps."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.made(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def one(place: Place, single: Path) -> Run:
    """Run of fifty steps in one process."""
    return place.run("one", f"init.hf={single}", *GENTLE).done()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(
    place: Place, single: Path, one: Run, layout: str
) -> None:
    processes, *overrides = LAYOUTS[layout]

    run = place.run(layout, f"init.hf={single}", *GENTLE, *overrides, processes=processes).done()

    assert list(run.curve) == list(one.curve) == list(range(1, 51))
    loss, norm = apart(first(run.curve, 10), one.curve)
    print(f"{layout}: {loss:.1e} apart over 10 steps, {apart(run.curve, one.curve)[0]:.1e} over 50")
    assert loss <= 1e-4
    assert norm <= 1e-3
    assert apart(run.curve, one.curve)[0] <= 2e-3
    assert run.evaluations == pytest.approx(one.evaluations, abs=2e-3)


def first(curve: Curve, steps: int) -> Curve:
    return {step: values for step, values in curve.items() if step <= steps}


# ------------------------------------------------------------------------ against transformers


def test_losses_equal_those_of_a_plain_loop(place: Place, single: Path) -> None:
    """Data, schedule, decay, clipping and z-loss are the same; the test checks that each
    matters."""
    settings = [f"optimizer.{name}={value}" for name, value in HARSH.items()]
    run = place.run(
        "plain", f"init.hf={single}", "train.steps=10", f"optimizer.clip_grad={CLIP}", *settings
    ).done()
    texts = sequences(place, 10 * BATCH)

    loss, norm = apart(run.curve, plain_loop(single, texts))
    print(f"{loss:.1e} apart in loss, {norm:.1e} in gradient norm")
    assert loss <= 1e-4
    assert norm <= 1e-3
    for name, wrong in {
        "decayed embedding": {"embedding_decay": HARSH["weight_decay"]},
        "no decay": {"weight_decay": 0.0},
        "no z-loss": {"z_loss": 0.0},
        "no clipping": {"clip": math.inf},
        "rate of the step before": {"late": 1},
    }.items():
        off = max(apart(run.curve, plain_loop(single, texts, **wrong)))
        print(f"{name}: {off:.1e} apart")
        assert off > 2e-3, name


def sequences(place: Place, count: int) -> torch.Tensor:
    """Return the sequences that a run of ten steps reads, in order: [count, 33]."""
    config = apply_overrides(load_recipe(f"{place.folder}/olmo2.py"), ["train.steps=10"])
    samples = TokenData.open(config, vocab_size=1024).train
    return torch.stack(
        [torch.cat([samples[i]["tokens"], samples[i]["labels"][-1:]]) for i in range(count)]
    )


def plain_loop(
    source: Path,
    texts: torch.Tensor,
    *,
    embedding_decay: float = 0.0,
    weight_decay: float = HARSH["weight_decay"],
    z_loss: float = HARSH["z_loss"],
    clip: float = CLIP,
    late: int = 0,
) -> Curve:
    """Train with AdamW, linear warmup and cosine decay to a tenth; return losses and gradient
    norms."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    embedding = model.get_input_embeddings().weight
    rest = [p for p in model.parameters() if p is not embedding]
    groups = [
        {"params": [embedding], "weight_decay": embedding_decay},
        {"params": rest, "weight_decay": weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    steps, curve = len(texts) // BATCH, {}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step - late, steps)
        text = texts[(step - 1) * BATCH : step * BATCH]
        logits = model(text[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + z_loss * logits.logsumexp(-1).square().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        curve[step] = (loss.item(), norm.item())
    return curve


def rate(step: int, steps: int) -> float:
    peak = HARSH["lr"]
    if step <= WARMUP:
        return peak * step / WARMUP
    done = (step - WARMUP) / (steps - WARMUP)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
