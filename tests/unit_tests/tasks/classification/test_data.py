"""Labelled texts as they are read, tokenized and ordered, and what is said of unsound ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.problem_types import SINGLE_LABEL
from megatron_olmo_bridge.nn.sequence_loss import sequence_losses
from megatron_olmo_bridge.tasks.classification.data import (
    Examples,
    balanced_weights,
    class_weights,
    load_examples,
    samples,
    tokenize,
)
from megatron_olmo_bridge.training.config import ClassificationConfig


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(text: object, label: object) -> dict[str, object]:
    return {"text": text, "label": label}


def load(train: Path, held_out: Path | None = None, **fields: str) -> tuple[Examples, Examples]:
    return load_examples(ClassificationConfig(str(train), str(held_out or train), **fields))


# --------------------------------------------------------------------------------------- reading


def test_jsonl(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "t.jsonl", record("one", "b"), record("two", "a"), record("3", "b"))
    held_out = jsonl(tmp_path / "v.jsonl", record("four", "b"))
    train_examples, held_out_examples = load(train, held_out)
    assert train_examples.texts == ["one", "two", "3"]
    assert train_examples.classes == held_out_examples.classes == ("a", "b")
    assert train_examples.labels.tolist() == [1, 0, 1]
    assert held_out_examples.labels.tolist() == [1]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """A byte order mark, quoted line breaks, commas and quotes, other columns."""
    file = tmp_path / "t.csv"
    file.write_bytes(
        b"\xef\xbb\xbfBody,Date,Topic\r\n"
        b'"a ""quoted"", text\nof two lines",2020,x\r\n'
        b"\r\n"
        b"caf\xc3\xa9,2021,y\r\n"
    )
    examples, _ = load(file, text="Body", label="Topic")
    assert examples.texts == ['a "quoted", text\nof two lines', "café"]
    assert examples.classes == ("x", "y")


def test_whole_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    numbers = (10, 9, "100", 2)
    file = jsonl(tmp_path / "t.jsonl", *(record("text", n) for n in numbers))
    examples, _ = load(file)
    assert examples.classes == ("2", "9", "10", "100")
    assert examples.labels.tolist() == [2, 1, 3, 0]


TWO = (record("a", "x"), record("b", "y"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record("", "x"), r"t\.jsonl:3: 'text' is empty"),
        (record(" \n", "x"), r"t\.jsonl:3: 'text' is empty"),
        (record(7, "x"), r"t\.jsonl:3: 'text' is 7, not a text"),
        (record(None, "x"), r"t\.jsonl:3: 'text' is null, not a text"),
        (record("a", ""), r"t\.jsonl:3: 'label' is empty"),
        (record("a", 0.5), r"t\.jsonl:3: 'label' is 0\.5, neither a text nor a whole number"),
        (record("a", True), r"t\.jsonl:3: 'label' is true, neither"),
        (record("a", ["x"]), r"t\.jsonl:3: 'label' is \[\"x\"\], neither"),
        ({"body": "a", "label": "x"}, r"t\.jsonl:3: no 'text'; it has 'body', 'label'\. Choose"),
        (["a", "x"], r"t\.jsonl:3: not a JSON object"),
    ],
)
def test_a_record_that_is_unsound_is_named(tmp_path: Path, bad: object, message: str) -> None:
    file = jsonl(tmp_path / "t.jsonl", *TWO, bad)
    with pytest.raises(InputError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"', r"t\.jsonl:2: not sound JSON"),
        ("t.jsonl", b'{"text": "a", "label": "x"}\n\xff\n', r"t\.jsonl:2: not UTF-8"),
        ("t.jsonl", rb'{"text": "\ud800", "label": "x"}', r"t\.jsonl:1: .* half a surrogate pair"),
        ("t.jsonl", b'{"label": ' + b"1" * 5000 + b"}", r"a number of more than 1,000 digits"),
        ("t.jsonl", b"[" * 3000, r"t\.jsonl:1: not sound JSON"),
        ("t.jsonl", b"", r"t\.jsonl: holds no examples"),
        ("t.jsonl", b"\n\n", r"t\.jsonl: holds no examples"),
        ("t.csv", b"", r"t\.csv: holds no examples"),
        ("t.csv", b"text,label\n", r"t\.csv: holds no examples"),
        ("t.csv", b"body,label\na,x\n", r"t\.csv:2: no 'text'; it has 'body', 'label'"),
        ("t.csv", b"text,label\na,x\nb\n", r"t\.csv:3: 1 fields, the first line names 2 columns"),
        ("t.csv", b'text,label\n"a\nb",x\n"c', r"t\.csv:4: malformed CSV"),
        ("t.csv", b'text,label\n"a\nb",x\n,y\n', r"t\.csv:4: 'text' is empty"),
        ("t.txt", b"a", r"t\.txt: not one of \.jsonl, \.csv"),
    ],
)
def test_a_file_that_is_unsound_is_named(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)


def test_what_is_said_of_files_and_classes_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"classification\.train is not set"):
        load_examples(ClassificationConfig())
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        load(tmp_path / "nowhere.jsonl")
    single = jsonl(tmp_path / "single.jsonl", record("a", "x"), record("b", "x"))
    with pytest.raises(InputError, match="has a single class, 'x'"):
        load(single)
    train = jsonl(tmp_path / "t.jsonl", *TWO)
    held_out = jsonl(tmp_path / "v.jsonl", record("a", "x"), record("b", "z"))
    with pytest.raises(InputError, match=r"v\.jsonl:2: label 'z' never occurs in the texts to"):
        load(train, held_out)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    weights = balanced_weights(labels, 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert weights.tolist() == pytest.approx(expected.tolist())
    assert weights[labels].mean() == pytest.approx(1)


def test_losses_are_weighted_and_do_not_depend_on_how_a_batch_is_cut() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    weights = torch.from_numpy(balanced_weights(labels.numpy(), 3))
    whole = sequence_losses(logits, labels, SINGLE_LABEL, weights)
    parts = [
        sequence_losses(logits[i], labels[i], SINGLE_LABEL, weights)
        for i in (slice(4), slice(4, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    # Over data that the weights were made from, this is the usual weighted mean.
    assert whole.mean() == pytest.approx(cross_entropy(logits, labels, weight=weights).item())


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_only_single_labels_can_be_balanced(problem_type: str, train_examples: Examples) -> None:
    task = ClassificationConfig(problem_type=problem_type, class_weights="balanced")
    with pytest.raises(InputError, match=f"problem_type is {problem_type}: set class_weights"):
        class_weights(task, train_examples)


# ---------------------------------------------------------------------------------------- tokens

WORDS = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6}


def tokenizer(frame: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    if frame:
        backend.post_processor = TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def examples(*texts: str) -> Examples:
    return Examples(list(texts), np.arange(len(texts)), tuple(map(str, range(len(texts)))))


def test_texts_are_cut_and_padded_on_the_right() -> None:
    found = tokenize(examples("a b c", "c", "a b c c c"), tokenizer(), 3, vocab_size=7)
    assert [found.row(i).tolist() for i in range(3)] == [[4, 5, 6], [6], [4, 5, 6]]
    assert found.truncated == 1
    assert found.padded([1, 0], 4, 1).tolist() == [[6, 1, 1, 1], [4, 5, 6, 1]]


def test_special_tokens_survive_the_cut() -> None:
    found = tokenize(examples("a b c", "a"), tokenizer(frame=True), 4, vocab_size=7)
    assert found.row(0).tolist() == [2, 4, 5, 3]


def test_many_texts_keep_their_order() -> None:
    texts = ["a" if i % 3 else "b c a b" for i in range(2500)]
    found = tokenize(examples(*texts), tokenizer(), 3, vocab_size=7)
    assert all(found.row(i).tolist() == ([4] if i % 3 else [5, 6, 4]) for i in range(2500))


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="has token 6, the model has 6: it is the tok"):
        tokenize(examples("a c"), tokenizer(), 3, vocab_size=6)


# ----------------------------------------------------------------------------------------- order


def test_every_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    stream = samples(1, 10, 0, 30)
    epochs = [stream[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_follows_from_seed_and_place_alone() -> None:
    whole = samples(1, 10, 0, 30)
    assert samples(1, 10, 7, 8) == whole[7:15]
    assert samples(2, 10, 0, 30) != whole
