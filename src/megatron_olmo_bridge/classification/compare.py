"""After the training: the baseline beside it, both measured in transformers, and the report.

In a process of its own, ``python -m megatron_olmo_bridge.classification JOB``: what megatron-core
leaves behind in the training process would disturb the clock.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from megatron_olmo_bridge.runtime.launch import processes, reporting_errors
from megatron_olmo_bridge.training.config import TrainingConfig

from .baseline import train_baseline
from .data import Examples, load_examples
from .hf import BATCH, HFClassifier, device_name
from .intervals import Indices, Interval, bootstrap, wilson
from .metrics import Speed, quality, speeds
from .report import COLUMNS, PAGE, Misread, Report, Result, rows, write_report

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
    macro_f1: float
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
    write_report(Report(job.config.name, setting, results, difference), folder)
    _print_table(results)
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
    probabilities = [c.probabilities(held_out.texts) for c in classifiers.values()]
    batch = min(len(held_out), TIMED, BATCH)
    times = speeds([c.predict for c in classifiers.values()], held_out.texts[:TIMED], batch)
    results = [
        _result(name, c.parameters, p, held_out, fast)
        for (name, c), p, fast in zip(classifiers.items(), probabilities, times, strict=True)
    ]
    difference = _difference(held_out, *probabilities) if len(probabilities) == 2 else None
    return results, difference


def _result(
    name: str, parameters: int, probabilities: torch.Tensor, held_out: Examples, speed: Speed
) -> Result:
    true, classes = held_out.labels, held_out.classes
    predicted = probabilities.argmax(-1).numpy()
    confidence = probabilities.amax(-1).tolist()
    wrong = [i for i in range(len(true)) if predicted[i] != true[i]]
    return Result(
        name,
        parameters,
        quality(true, predicted, classes),
        speed,
        wilson(len(true) - len(wrong), len(true)),
        bootstrap(lambda i: quality(true[i], predicted[i], classes).macro_f1, len(true)),
        [
            Misread(held_out.texts[i], classes[true[i]], classes[predicted[i]], confidence[i])
            for i in sorted(wrong, key=lambda i: -confidence[i])
        ],
    )


def _difference(held_out: Examples, first: torch.Tensor, second: torch.Tensor) -> Interval:
    """Return the interval of the first one's macro-F1 minus the second one's, on the same texts."""
    true, classes = held_out.labels, held_out.classes
    one, two = (p.argmax(-1).numpy() for p in (first, second))

    def measure(i: Indices) -> float:
        scores = [quality(true[i], p[i], classes).macro_f1 for p in (one, two)]
        return scores[0] - scores[1]

    return bootstrap(measure, len(true))


def _name(config: TrainingConfig) -> str:
    source = config.init.hf or config.init.checkpoint or config.name
    return source.rstrip("/").rpartition("/")[2]


def _setting(job: Job, train: Examples, held_out: Examples) -> dict[str, str]:
    config = job.config
    return {
        "Data": f"{len(train):,} texts to train on, {len(held_out):,} held out, "
        f"{len(train.classes)} classes",
        "Texts": f"cut to {config.train.sequence_length} tokens",
        "In training": f"{_name(config)} had macro-F1 {job.macro_f1:.4f} on the same texts, in "
        "megatron-core",
        "Device": f"{device_name()}; {config.train.precision}; transformers, eager",
        "Latency": f"of one text, tokenising included, over {min(TIMED, len(held_out))} texts, the "
        "models in turns",
        "Throughput": f"in batches of {min(len(held_out), TIMED, BATCH)}",
    }


def _print_table(results: Sequence[Result]) -> None:
    lines = [COLUMNS, *rows(results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        first, *others = (
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        _say("  ".join([first, *others]))


def _say(line: str) -> None:
    print(line, flush=True)
