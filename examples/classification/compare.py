"""Compare a trained classifier with an encoder trained on the same texts.

    python examples/classification/compare.py RUN --baseline ENCODER

RUN is the checkpoint.save of an `olmo-bridge train` with a classification section; start this in
the folder where that was started. RUN gets classification.html, results.json and baseline/, the
trained encoder. Both classifiers run in transformers, on the same texts and device, in turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from comparison.baseline import Data, train_baseline
from comparison.hf import BATCH, device_name
from comparison.measure import TIMED, measure
from comparison.report import PAGE, Report, columns, rows, write_report
from transformers.utils import logging

from megatron_olmo_bridge.errors import BridgeError, InputError
from megatron_olmo_bridge.formats.plain_yaml import read_yaml
from megatron_olmo_bridge.tasks.classification.data import load_examples
from megatron_olmo_bridge.tasks.classification.problems import problem_of
from megatron_olmo_bridge.tasks.classification.stopping import HISTORY, best, read_history
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.folder import RUN_FILE
from megatron_olmo_bridge.training.monitor.human import spoken
from megatron_olmo_bridge.training.monitor.report import write_report as write_training_report
from megatron_olmo_bridge.training.recipes import from_dict

BASELINE = "baseline"
"""Folder of the trained encoder, in that of the run."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--baseline", metavar="ENCODER", help="folder or hub id")
    parser.add_argument(
        "--baseline-lr", type=float, metavar="LR", help="its peak learning rate [optimizer.lr]"
    )
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns that the encoder's head is new, as it should be
    try:
        compare(options.run, options.baseline, options.baseline_lr)
    except BridgeError as error:
        parser.exit(error.exit_code, f"compare.py: {error}\n")


def compare(folder: Path, encoder: str | None, lr: float | None) -> None:
    """Train the encoder, measure both classifiers, write the report and print its table.

    Args:
        folder: Folder of the classifier's run.
        encoder: Folder or hub id; None to measure the classifier alone.
        lr: The encoder's peak learning rate; None for the classifier's.

    Raises:
        BridgeError: The run, its data or the encoder is missing or damaged.
    """
    config, score = read_run(folder)
    assert config.classification is not None
    data = load_examples(config.classification)
    paths = {base_name(config): str(folder / "classifier")}
    if encoder is not None:
        train_baseline(encoder, lr, config, data, folder / BASELINE, say)
        paths[last_part(encoder)] = str(folder / BASELINE)
    results, difference = measure(paths, data[1], config)
    setting = describe_setting(config, score, data)
    report = Report(config.name, problem_of(config.classification), setting, results, difference)
    write_report(report, folder)
    write_training_report(folder)  # again: now it links to the new page
    print_table(report)
    say(
        f"ms: one text, tokenizing included; texts/s: in batches of {results[0].speed.batch_size}; "
        f"{device_name()}, {config.train.precision}"
    )
    say(f">> report: {folder / PAGE}")


def read_run(folder: Path) -> tuple[TrainingConfig, float]:
    """Return the config of a classifier's run, and the score of the weights that it kept.

    Raises:
        InputError: The folder is not that of a classifier's run.
        FormatError: A file in it is damaged.
    """
    if not (folder / RUN_FILE).is_file() or not (folder / "classifier").is_dir():
        raise InputError(f"{folder}: has no {RUN_FILE} and classifier/; name the run's folder")
    config, history = from_dict(read_yaml(folder / RUN_FILE)), read_history(folder / HISTORY)
    if config.classification is None or not history:
        raise InputError(f"{folder}: is not the folder of a classifier's run")
    return config, best(history).score


def base_name(config: TrainingConfig) -> str:
    """Return the name of the model that was fine-tuned."""
    return last_part(config.init.hf or config.init.checkpoint or config.name)


def last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def describe_setting(config: TrainingConfig, score: float, data: Data) -> dict[str, str]:
    """Return what a reader of the report must know of data and device."""
    assert config.classification is not None
    problem, (train, held_out) = problem_of(config.classification), data
    return {
        "Data": f"{len(train):,} texts to train on, {len(held_out):,} held out; "
        f"{problem.describe(train.labels, train.classes)}",
        "Texts": f"cut to {config.train.sequence_length} tokens",
        "In training": f"{base_name(config)} had {spoken(problem.score)} {score:.4f} on the same "
        "texts, in megatron-core",
        "Device": f"{device_name()}; {config.train.precision}; transformers, eager",
        "Latency": f"of one text, tokenizing included, over {min(TIMED, len(held_out))} texts, the "
        "models in turns",
        "Throughput": f"in batches of {min(len(held_out), TIMED, BATCH)}",
    }


def print_table(report: Report) -> None:
    """Print the report's table with aligned columns."""
    lines = [columns(report), *rows(report)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        first, *others = (
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        say("  ".join([first, *others]))


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
