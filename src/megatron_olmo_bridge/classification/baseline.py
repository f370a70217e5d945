"""An encoder trained on the same data by a plain PyTorch loop, to report beside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.problem_types import SINGLE_LABEL
from megatron_olmo_bridge.nn.sequence_loss import sequence_losses
from megatron_olmo_bridge.training.config import ClassificationConfig, TrainingConfig
from megatron_olmo_bridge.training.monitor.human import spoken

from .data import Examples, balanced_weights, samples
from .hf import HFClassifier, device
from .problems import AnyQuality, Problem, problem_of
from .stopping import Evaluation, best, out_of_patience

Say = Callable[[str], None]


def train_baseline(
    config: TrainingConfig, train: Examples, held_out: Examples, folder: Path, say: Say
) -> None:
    """Train ``classification.baseline`` and write it as a Hugging Face checkpoint.

    As many steps, of the same examples in the same order, as the model that it is compared with;
    AdamW, the learning rate up linearly in the warm-up and down linearly to 0 after it, which is
    usual for encoders. The state with the best score is kept; ``patience`` ends it early.

    Args:
        config: of the run.
        train, held_out: the data.
        folder: to make, or to replace.
        say: told a line of each evaluation.

    Raises:
        InputError: transformers can't load it, or the run has no baseline.
    """
    task = config.classification
    if task is None or task.baseline is None:
        raise InputError("classification.baseline is not set: name an encoder's folder or hub id")
    problem = problem_of(task)
    torch.manual_seed(config.train.seed)  # of the head and of dropout
    classifier = HFClassifier.load(
        task.baseline,
        config.train.sequence_length,
        classes=train.classes,
        problem_type=task.problem_type,
    )
    model = classifier.model
    optimizer = _optimizer(model, config, task.baseline_lr or config.optimizer.lr)
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


def measure(problem: Problem, examples: Examples, logits: torch.Tensor) -> AnyQuality:
    """Return the quality of logits [n, outputs], float32, of all the examples."""
    labels, outputs = torch.from_numpy(examples.labels), len(examples.classes)
    counts = problem.counts(labels, problem.predictions(logits), outputs)
    return problem.quality(counts, examples.classes)


def class_weights(task: ClassificationConfig, train: Examples) -> torch.Tensor | None:
    """Return [classes] of float32, as ``classification.class_weights`` says; None for none.

    The mean of the weighted losses is the loss: the weights' mean over the data is 1, and so it
    doesn't depend on how a batch is cut up, which dividing by the batch's own weights would.

    Raises:
        InputError: it is neither none nor balanced, or the problem type has no such weights.
    """
    if task.class_weights == "none":
        return None
    if task.class_weights != "balanced":
        raise InputError(
            f"classification.class_weights is {task.class_weights!r}, neither none nor balanced"
        )
    if task.problem_type != SINGLE_LABEL:
        raise InputError(
            f"classification.class_weights=balanced is for {SINGLE_LABEL}, and "
            f"classification.problem_type is {task.problem_type}: set class_weights to none"
        )
    return torch.from_numpy(balanced_weights(train.labels, len(train.classes)))


def _step(
    classifier: HFClassifier,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    train: Examples,
    weights: torch.Tensor | None,
    step: int,
) -> float:
    """One optimizer step; its loss."""
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
    """AdamW; matrices decay, norms and biases don't."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    o = config.optimizer
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )


def _share(step: int, config: TrainingConfig) -> float:
    """Of the peak learning rate, in a step from 0."""
    warmup, steps = config.schedule.warmup_steps, config.train.steps
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _save(classifier: HFClassifier, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    classifier.model.save_pretrained(partial)
    classifier.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
