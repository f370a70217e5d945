"""Labelled texts: read them from .jsonl or .csv files, tokenize them, and shuffle each epoch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.files import open_regular, parse_json
from megatron_olmo_bridge.nn.problem_types import SINGLE_LABEL
from megatron_olmo_bridge.training.config import ClassificationConfig

from .problems import Problem, SingleLabel, problem_of, some

SUFFIXES = (".jsonl", ".csv")
_TOKENIZED_AT_ONCE = 1000
_LONGEST_LINE = 16 << 20
"""Maximum length of a line, in bytes."""

Integers = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]


@dataclass(frozen=True)
class Examples:
    """Texts and their labels."""

    texts: list[str]
    labels: Labels
    """Single-label: indices into ``classes``, [n], int64. Multi-label: 1 for each label of a text,
    else 0, [n, classes], float32. Regression: values, [n, classes], float32."""
    classes: tuple[str, ...]
    """Names of the model's outputs; classes are sorted, numerically if all are whole numbers."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Record:
    """A text and its label."""

    text: str
    label: Any
    """A name, a list of names or a list of numbers, depending on the problem type."""
    where: str
    """``FILE:LINE``"""


def load_examples(config: ClassificationConfig) -> tuple[Examples, Examples]:
    """Return training and held-out examples, with the classes of the training file.

    Raises:
        InputError: a file is missing or a line is malformed; the message has file and line.
    """
    paths = {"classification.train": config.train, "classification.validation": config.validation}
    for option, path in paths.items():
        if not path:
            raise InputError(f"{option} is not set: name a .jsonl or .csv file with labelled texts")
    problem = problem_of(config)
    train, held_out = (
        list(read_records(path, config.text, config.label, problem)) for path in paths.values()
    )
    classes = problem.names([r.label for r in train], config.label, config.train)
    return _examples(train, problem, classes), _examples(held_out, problem, classes)


def read_records(path: str | Path, text: str, label: str, problem: Problem) -> Iterator[Record]:
    """Yield the records of a .jsonl or .csv file.

    Args:
        path: a UTF-8 file; the first line of a .csv has the column names.
        text, label: names of the fields or columns.
        problem: reads the labels.

    Raises:
        InputError: the file is missing or a line is malformed; the message has file and line.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: not one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    is_empty = True
    for number, fields in _json_lines(path) if path.suffix == ".jsonl" else _csv_rows(path):
        is_empty = False
        where = f"{path}:{number}"
        for name in (text, label):
            if name not in fields:
                raise InputError(
                    f"{where}: no {name!r}; it has {some(list(fields))}. Choose the fields by "
                    "classification.text and classification.label."
                )
        read = problem.read(fields[label], label, where)
        yield Record(_text(fields[text], text, where), read, where)
    if is_empty:
        raise InputError(f"{path}: holds no examples")


def _lines(path: Path) -> Iterator[str]:
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
            if len(line) > _LONGEST_LINE:
                raise InputError(f"{path}:{number}: a line of more than {_LONGEST_LINE:,} bytes")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8: {error.reason}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = parse_json(line.encode(), f"{path}:{number}")
        except FormatError as error:
            raise InputError(str(error)) from error
        if not isinstance(fields, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        yield number, fields


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(_lines(path), strict=True)
    first_line = 1  # of a row, which may have several
    try:
        header = next(reader, [])
        first_line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{path}:{first_line}: {len(row)} fields, the first line names {len(header)} "
                    "columns"
                )
            if row:
                yield first_line, dict(zip(header, row, strict=True))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{first_line}: malformed CSV: {error}") from error


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name!r} is {json.dumps(value)[:40]}, not a text")
    if not value.strip():
        raise InputError(f"{where}: {name!r} is empty")
    return value


def _examples(records: list[Record], problem: Problem, classes: tuple[str, ...]) -> Examples:
    labels = []
    for record in records:
        try:
            labels.append(problem.encode(record.label, classes))
        except ValueError as error:
            raise InputError(f"{record.where}: {error}") from error
    dtype = np.int64 if isinstance(problem, SingleLabel) else np.float32
    return Examples([record.text for record in records], np.array(labels, dtype), classes)


def balanced_weights(labels: Integers, classes: int) -> npt.NDArray[np.float32]:
    """Return class weights [classes]: n / (classes * examples of the class), with mean 1 over n.

    Source: ``compute_class_weight("balanced")`` of scikit-learn.
    """
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * counts)).astype(np.float32)


def class_weights(task: ClassificationConfig, train: Examples) -> torch.Tensor | None:
    """Return the weight of each class in the loss, [classes], float32; None if all are equal.

    The loss is the plain mean of the weighted losses. PyTorch would divide by the sum of a batch's
    weights, and the loss would then depend on how a batch is split.

    Raises:
        InputError: ``classification.class_weights`` is neither none nor balanced, or is balanced
            for a problem type that has no classes.
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


# ------------------------------------------------------------------------------------------ tokens


@dataclass(frozen=True)
class Tokenized:
    """Tokens of all texts, concatenated, and the label of each text."""

    tokens: npt.NDArray[np.int32]
    """[total]"""
    ends: Integers
    """End of each text in ``tokens``, [n]."""
    labels: Labels
    """Labels, as in :class:`Examples`."""
    truncated: int
    """Number of texts that were truncated."""

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int) -> npt.NDArray[np.int32]:
        """Return the tokens of one text."""
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]

    def padded(self, indices: Sequence[int], length: int, pad_token_id: int) -> Integers:
        """Return tokens [len(indices), length], padded on the right."""
        batch = np.full((len(indices), length), pad_token_id, np.int64)
        for i, index in enumerate(indices):
            row = self.row(index)
            batch[i, : len(row)] = row
        return batch


def tokenize(examples: Examples, tokenizer: Any, length: int, vocab_size: int) -> Tokenized:
    """Tokenize as a transformers pipeline does, including special tokens.

    Args:
        examples: the texts.
        tokenizer: a transformers tokenizer.
        length: maximum number of tokens per text; longer texts are truncated.
        vocab_size: vocabulary size of the model.

    Raises:
        InputError: the tokenizer emits tokens outside the vocabulary, or none for a text.
    """
    rows: list[npt.NDArray[np.int32]] = []
    truncated = 0
    for first in range(0, len(examples), _TOKENIZED_AT_ONCE):
        texts = examples.texts[first : first + _TOKENIZED_AT_ONCE]
        for ids in tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]:
            if len(ids) > length:
                truncated += 1
                # Tokenize again with truncation, which keeps special tokens at the end.
                text = examples.texts[len(rows)]
                ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
            if not ids:
                raise InputError(
                    f"the tokenizer returns no tokens for {examples.texts[len(rows)]!r}"
                )
            rows.append(np.array(ids, np.int32))
    tokens = np.concatenate(rows)
    if tokens.max() >= vocab_size:
        raise InputError(
            f"the tokenizer has token {tokens.max()}, the model has {vocab_size}: it is the "
            "tokenizer of another model. Set data.tokenizer to the model's own."
        )
    ends = np.cumsum([len(row) for row in rows])
    return Tokenized(tokens, ends, examples.labels, truncated)


# ------------------------------------------------------------------------------------------- order


def samples(seed: int, count: int, first: int, number: int) -> list[int]:
    """Return the indices of ``number`` samples, from ``first`` on, of an endless stream of epochs.

    Each epoch is shuffled anew. The result depends on the arguments alone, for exact resume.

    Args:
        seed: seed of the shuffling.
        count: number of examples in an epoch.
        first: number of the first sample in the stream, from 0.
        number: number of samples to return.
    """
    places = (divmod(i, count) for i in range(first, first + number))
    return [int(_shuffled(seed, count, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=4)
def _shuffled(seed: int, count: int, epoch: int) -> Integers:
    return np.random.default_rng([seed, epoch]).permutation(count)
