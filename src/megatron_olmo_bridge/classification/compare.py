"""After the training: the baseline beside it, both measured in transformers, and the report.

In a process of its own, ``python -m megatron_olmo_bridge.classification JOB``: what megatron-core
leaves behind in the training process would disturb the clock.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from megatron_olmo_bridge.runtime.launch import processes, reporting_errors
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.monitor.human import spoken

from .baseline import measure as measure_quality
from .baseline import train_baseline
from .data import Examples, load_examples
from .hf import BATCH, HFClassifier, device_name
from .intervals import Indices, Interval, bootstrap, wilson
from .metrics import Speed, speeds
from .problems import Problem, problem_of
from .report import PAGE, Misread, Report, Result, columns, rows, write_report

TIMED = 200
"""Texts that are timed, at most."""
BASELINE = "baseline"
"""Folder of the trained baseline, in that of the report."""


@dataclass(frozen=True)
class Job:
    """What to compare."""

    config: TrainingConfig
    classifier: str
    """The trained classifier, a Hugging Face folder."""
    folder: str
    """For the report."""
    score: float
    """The classifier's when it was kept, in training."""

    def run(self, say: Callable[[str], None]) -> None:
        """Do it in a process of its own, and say what that says.

        Raises:
            BridgeError: what went wrong there.
        """
        arguments = [json.dumps(asdict(self))]
        with processes("megatron_olmo_bridge.classification", arguments, 1) as lines:
            for line in lines:
                say(line.rstrip("\n"))


def main() -> None:
    """Do the job that the command line has, in this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it says that the encoder's head is new: so it should be
    values = json.loads(sys.argv[1])
    schema = OmegaConf.structured(TrainingConfig)
    config = OmegaConf.to_object(OmegaConf.merge(schema, values.pop("config")))
    assert isinstance(config, TrainingConfig)
    with reporting_errors():
        compare(Job(config, **values))


def compare(job: Job) -> None:
    """Train the baseline if there is to be one, measure, write the report and print its table."""
    task, folder = job.config.classification, Path(job.folder)
    assert task is not None
    train, held_out = load_examples(task)
    paths = {_name(job.config): job.classifier}
    if task.baseline is not None:
        train_baseline(job.config, train, held_out, folder / BASELINE, _say)
        paths[task.baseline.rstrip("/").rpartition("/")[2]] = str(folder / BASELINE)
    results, difference = measure(paths, held_out, job.config)
    setting = _setting(job, train, held_out)
    report = Report(job.config.name, problem_of(task), setting, results, difference)
    write_report(report, folder)
    _print_table(report)
    _say(
        f"ms: one text, tokenising included; texts/s: in batches of {results[0].speed.batch_size}; "
        f"{device_name()}, {job.config.train.precision}"
    )
    _say(f">> report: {folder / PAGE}")


def measure(
    paths: dict[str, str], held_out: Examples, config: TrainingConfig
) -> tuple[list[Result], Interval | None]:
    """Measure quality on all held-out texts, and speed on some of them, the classifiers in turns.

    Args:
        paths: name to folder of each classifier.
        held_out: the texts.
        config: gives the longest text, the dtype and the batch.

    Returns:
        A result for each, and the interval of the difference where there are two.
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

    intervals = {measure: bound(measure) for measure in problem.bounded}
    misread = _misread(problem, held_out, logits)
    return Result(name, parameters, quality, speed, intervals, misread)


def _misread(problem: Problem, held_out: Examples, logits: torch.Tensor) -> list[Misread]:
    """Return the texts with a wrong prediction, those that are furthest off first."""
    names, labels = held_out.classes, held_out.labels
    predicted, scores = problem.predictions(logits).numpy(), problem.scores(logits).numpy()
    misread = [
        Misread(
            held_out.texts[i],
            problem.words(labels[i], names),
            problem.words(predicted[i], names),
            problem.distance(labels[i], scores[i]),
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


def _name(config: TrainingConfig) -> str:
    source = config.init.hf or config.init.checkpoint or config.name
    return source.rstrip("/").rpartition("/")[2]


def _setting(job: Job, train: Examples, held_out: Examples) -> dict[str, str]:
    config = job.config
    assert config.classification is not None
    problem = problem_of(config.classification)
    return {
        "Data": f"{len(train):,} texts to train on, {len(held_out):,} held out; "
        f"{problem.describe(train.labels, train.classes)}",
        "Texts": f"cut to {config.train.sequence_length} tokens",
        "In training": f"{_name(config)} had {spoken(problem.score)} {job.score:.4f} on the same "
        "texts, in megatron-core",
        "Device": f"{device_name()}; {config.train.precision}; transformers, eager",
        "Latency": f"of one text, tokenising included, over {min(TIMED, len(held_out))} texts, the "
        "models in turns",
        "Throughput": f"in batches of {min(len(held_out), TIMED, BATCH)}",
    }


def _print_table(report: Report) -> None:
    lines = [columns(report), *rows(report)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        first, *others = (
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        _say("  ".join([first, *others]))


def _say(line: str) -> None:
    print(line, flush=True)
