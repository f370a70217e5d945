"""Texts of three classes that a tiny model learns at once, with tokenizer and encoder."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, set_seed

from megatron_olmo_bridge.tasks.classification.data import Examples

CLASSES = ("first", "second", "third")
WORDS = ["[UNK]", "[PAD]", *CLASSES, *(f"noise{i}" for i in range(11))]


def make_examples(count: int, seed: int) -> Examples:
    """Texts of one to nine words, one of which is the name of the class."""
    rng = random.Random(seed)
    labels = [rng.randrange(3) for _ in range(count)]
    texts = []
    for label in labels:
        words = rng.choices(WORDS[5:], k=rng.randint(0, 8))
        words.insert(rng.randint(0, len(words)), CLASSES[label])
        texts.append(" ".join(words))
    return Examples(texts, np.array(labels), CLASSES)


@pytest.fixture
def train_examples() -> Examples:
    return make_examples(200, 0)


@pytest.fixture
def held_out_examples() -> Examples:
    return make_examples(25, 1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny BERT, not trained. Not to be changed."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    set_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
