"""Train an encoder on the same texts, in a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_olmo_bridge.nn.sequence_loss import sequence_losses
from megatron_olmo_bridge.storage.atomic import replacing_folder
from megatron_olmo_bridge.tasks.classification.data import Examples, class_weights, samples
from megatron_olmo_bridge.tasks.classification.metrics import Metrics
from megatron_olmo_bridge.tasks.classification.problems import Problem, problem_of
from megatron_olmo_bridge.tasks.classification.stopping import Evaluation, best, out_of_patience
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.monitor.human import spoken

from .hf import HFClassifier, device

Say = Callable[[str], None]


Data = tuple[Examples, Examples]
"""Texts to train on, and texts held out."""


def train_baseline(
    encoder: str, lr: float | None, config: TrainingConfig, data: Data, folder: Path, say: Say
) -> None:
    """Train an encoder as long as the classifier, and write it as a Hugging Face checkpoint.

    It sees the same examples in the same order. AdamW; the learning rate rises linearly in the
    warm-up and falls linearly to 0, as is usual for encoders. The state with the best score is
    kept; ``classification.patience`` ends the training early.

    Args:
        encoder: Folder or hub id.
        lr: Peak learning rate; None for that of the classifier.
        config: Config of the classifier's run.
        data: Of the same run.
        folder: Folder to write to; replaced if it exists.
        say: Called with a line for each evaluation.

    Raises:
        InputError: transformers can't load the encoder.
    """
    task, (train, held_out) = config.classification, data
    assert task is not None
    problem = problem_of(task)
    torch.manual_seed(config.train.seed)  # for the head and dropout
    classifier = HFClassifier.load(
        encoder,
        config.train.sequence_length,
        classes=train.classes,
        problem_type=task.problem_type,
    )
    model = classifier.model
    optimizer = _optimizer(model, config, lr or config.optimizer.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, config))
    weights = class_weights(task, train)
    weights = None if weights is None else weights.to(device())
    history: list[Evaluation] = []
    kept: dict[str, torch.Tensor] = {}
    for step in range(config.train.steps):
        loss = _step(classifier, optimizer, config, train, weights, step)
        schedule.step()
        if (step + 1) % config.evaluation.interval and step + 1 != config.train.steps:
            continue
        found = measure(problem, held_out, classifier.outputs(held_out.texts)).measures
        history.append(Evaluation(step + 1, found[problem.score]))
        figures = ", ".join(f"{spoken(name)} {value:.4f}" for name, value in found.items())
        say(f">> baseline at step {step + 1}: loss {loss:.4f}; held out: {figures}")
        if best(history) is history[-1]:
            kept = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
        if out_of_patience(history, task.patience):
            break
    model.load_state_dict(kept)
    _save(classifier, folder)


def measure(problem: Problem, examples: Examples, logits: torch.Tensor) -> Metrics:
    """Return the quality of logits [n, outputs], float32, of all the examples."""
    labels, outputs = torch.from_numpy(examples.labels), len(examples.classes)
    counts = problem.counts(labels, problem.predictions(logits), outputs)
    return problem.quality(counts, examples.classes)


def _step(
    classifier: HFClassifier,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    train: Examples,
    weights: torch.Tensor | None,
    step: int,
) -> float:
    """Take an optimizer step, and return its loss."""
    size, at_once = config.train.global_batch_size, config.train.micro_batch_size
    batch = samples(config.train.seed, len(train), step * size, size)
    half = config.train.precision == "bfloat16"
    classifier.model.train()
    optimizer.zero_grad()
    total = 0.0
    for first in range(0, size, at_once):
        part = batch[first : first + at_once]
        labels = torch.from_numpy(train.labels[part]).to(device())
        with torch.autocast(device().type, torch.bfloat16, enabled=half):
            logits = classifier.logits([train.texts[i] for i in part])
        kind = classifier.model.config.problem_type
        loss = sequence_losses(logits, labels, kind, weights).sum() / size
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    if config.optimizer.clip_grad:
        torch.nn.utils.clip_grad_norm_(classifier.model.parameters(), config.optimizer.clip_grad)
    optimizer.step()
    return total


def _optimizer(model: Any, config: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices, and none on norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    o = config.optimizer
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )


def _share(step: int, config: TrainingConfig) -> float:
    """Return a step's share of the peak learning rate; steps count from 0."""
    warmup, steps = config.schedule.warmup_steps, config.train.steps
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _save(classifier: HFClassifier, folder: Path) -> None:
    with replacing_folder(folder) as partial:
        classifier.model.save_pretrained(partial)
        classifier.tokenizer.save_pretrained(partial)
