"""Measure quality and speed of classifiers in transformers, on the same texts and device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_olmo_bridge.tasks.classification.data import Examples
from megatron_olmo_bridge.tasks.classification.problems import Problem, problem_of
from megatron_olmo_bridge.training.config import TrainingConfig

from .baseline import measure as measure_quality
from .hf import BATCH, HFClassifier
from .intervals import Indices, Interval, bootstrap, wilson
from .outcomes import OUTCOMES
from .report import Misread, Result
from .speed import Speed, speeds

TIMED = 200
"""Texts that are timed, at most."""


def measure(
    paths: dict[str, str], held_out: Examples, config: TrainingConfig
) -> tuple[list[Result], Interval | None]:
    """Measure quality on all held-out texts, and speed on some of them.

    Args:
        paths: Folder of each classifier, by name.
        held_out: The texts.
        config: Config of the run: longest text, dtype.

    Returns:
        A result for each classifier, and the interval of the difference in score if there are two.
    """
    dtype = getattr(torch, config.train.precision)
    classifiers = {
        name: HFClassifier.load(path, config.train.sequence_length, dtype=dtype)
        for name, path in paths.items()
    }
    assert config.classification is not None
    problem = problem_of(config.classification)
    logits = [c.outputs(held_out.texts) for c in classifiers.values()]
    batch = min(len(held_out), TIMED, BATCH)
    times = speeds([c.outputs for c in classifiers.values()], held_out.texts[:TIMED], batch)
    results = [
        _result(name, c.parameters, problem, logits_of, held_out, fast)
        for (name, c), logits_of, fast in zip(classifiers.items(), logits, times, strict=True)
    ]
    difference = _difference(problem, held_out, *logits) if len(logits) == 2 else None
    return results, difference


def _result(
    name: str,
    parameters: int,
    problem: Problem,
    logits: torch.Tensor,
    held_out: Examples,
    speed: Speed,
) -> Result:
    quality = measure_quality(problem, held_out, logits)

    def bound(measure: str) -> Interval:
        if measure == "accuracy":
            right = (problem.predictions(logits).numpy() == held_out.labels).sum()
            return wilson(int(right), len(held_out))
        return bootstrap(_on_a_sample(problem, held_out, logits, measure), len(held_out))

    intervals = {measure: bound(measure) for measure in OUTCOMES[problem.problem_type].bounded}
    misread = _misread(problem, held_out, logits)
    return Result(name, parameters, quality, speed, intervals, misread)


def _misread(problem: Problem, held_out: Examples, logits: torch.Tensor) -> list[Misread]:
    """Return the texts with a wrong prediction, those that are furthest off first."""
    shown = OUTCOMES[problem.problem_type]
    names, labels = held_out.classes, held_out.labels
    predicted, scores = problem.predictions(logits).numpy(), shown.scores(logits).numpy()
    misread = [
        Misread(
            held_out.texts[i],
            shown.words(labels[i], names),
            shown.words(predicted[i], names),
            shown.distance(labels[i], scores[i]),
        )
        for i in range(len(held_out))
        if (predicted[i] != labels[i]).any()
    ]
    return sorted(misread, key=lambda m: -m.distance)


def _difference(
    problem: Problem, held_out: Examples, first: torch.Tensor, second: torch.Tensor
) -> Interval:
    """Return the interval of the first one's score minus the second one's, on the same texts."""
    one, two = (_on_a_sample(problem, held_out, x, problem.score) for x in (first, second))
    return bootstrap(lambda i: one(i) - two(i), len(held_out))


def _on_a_sample(
    problem: Problem, held_out: Examples, logits: torch.Tensor, measure: str
) -> Callable[[Indices], float]:
    """Return the function from indices of texts to a measure on these texts."""
    labels, names = torch.from_numpy(held_out.labels), held_out.classes
    predictions = problem.predictions(logits)

    def value(i: Indices) -> float:
        counts = problem.counts(labels[i], predictions[i], len(names))
        return problem.quality(counts, names).measures[measure]

    return value
