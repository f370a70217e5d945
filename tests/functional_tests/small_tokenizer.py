"""Make a small tokenizer and text for it, so that nothing has to be downloaded."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
SYLLABLES = ["ka", "lo", "mi", "tu", "shé", "本", "ra", "pen", "  ", "\n", "x'", "9"]


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Return documents of at most ``words`` words, some not in ASCII and some of several lines."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))  # noqa: E731
    return [" ".join(word() for _ in range(rng.randint(1, words))) for _ in range(count)]


def make_tokenizer(folder: Path, eos: str | None = EOS, vocab_size: int = 400) -> Path:
    """Train a byte-level BPE tokenizer and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(300, seed=99), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    return folder
