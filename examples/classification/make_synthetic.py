"""Make small labelled texts that can be learned, and two tiny untrained models to learn them.

    python examples/classification/make_synthetic.py OUT --classes 10

Each class has a few words of its own, which stand in its texts amid noise that all classes share;
some texts have the words of the class beside theirs, so that no model gets them all right.
With --problem-type multi_label_classification a text has the words of up to three classes, and a
list of labels; with regression its label is a number: the place of its class on a scale of 0 to 1.
OUT gets train.jsonl, validation.jsonl, olmo2-tiny/ (to be fine-tuned) and modernbert-tiny/ (the
baseline), both with random weights and a tokenizer of the texts' words. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

KEYWORDS, NOISE_WORDS = 4, 200
"""Words of each class, and words that all classes share."""
TEXT_WORDS = (8, 40)
"""Shortest and longest text."""
MISLEADING = 0.04
"""Share of the texts that have the words of another class."""
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def make_words(rng: random.Random, count: int) -> list[str]:
    """Pronounceable words, all different."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = rng.randint(2, 4)
        words[
            "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
        ] = None
    return list(words)


def make_texts(
    classes: int, count: int, seed: int, problem_type: str = "single_label_classification"
) -> list[dict[str, Any]]:
    """Labelled texts, the classes in turns: each text has two of each of its classes' words."""
    rng = random.Random(seed)
    words = make_words(rng, NOISE_WORDS + classes * KEYWORDS)
    noise, own = words[:NOISE_WORDS], words[NOISE_WORDS:]
    names = [f"topic {label:0{len(str(classes - 1))}}" for label in range(classes)]
    texts = []
    for i in range(count):
        label = i % classes
        topics, value = [(label + (rng.random() < MISLEADING)) % classes], names[label]
        if problem_type == "multi_label_classification":
            topics = sorted(rng.sample(range(classes), rng.randint(0, min(3, classes))))
            value = [names[topic] for topic in topics]
        elif problem_type == "regression":
            value = round(label / (classes - 1), 3)
        text = rng.choices(noise, k=rng.randint(*TEXT_WORDS) - 2)
        for topic in topics:
            for word in rng.sample(own[topic * KEYWORDS : (topic + 1) * KEYWORDS], 2):
                text.insert(rng.randint(0, len(text)), word)
        texts.append({"text": " ".join(text), "label": value})
    return texts


def make_tokenizer(texts: list[str], with_cls: bool) -> PreTrainedTokenizerFast:
    """One token for each word; encoders have [CLS] and [SEP] around a text."""
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if with_cls:
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        special |= {"eos_token": "[EOS]"}
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator(texts, WordLevelTrainer(special_tokens=list(special.values())))
    if with_cls:
        ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_models(out: Path, texts: list[str]) -> None:
    """Tiny random models with their tokenizers."""
    tokenizer = make_tokenizer(texts, with_cls=False)
    config = Olmo2Config(
        **SHAPE,
        num_key_value_heads=2,
        vocab_size=_rows(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Olmo2ForCausalLM(config).save_pretrained(out / "olmo2-tiny")
    tokenizer.save_pretrained(out / "olmo2-tiny")
    tokenizer = make_tokenizer(texts, with_cls=True)
    encoder = ModernBertConfig(
        **SHAPE,
        vocab_size=_rows(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    ModernBertForMaskedLM(encoder).save_pretrained(out / "modernbert-tiny")
    tokenizer.save_pretrained(out / "modernbert-tiny")


def _rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the rows of the embedding: a multiple that small tensor-parallel sizes divide."""
    return -(-len(tokenizer) // 64) * 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--examples", type=int, default=4000, help="to train on")
    parser.add_argument("--validation", type=int, default=500, help="held out")
    parser.add_argument(
        "--problem-type",
        default="single_label_classification",
        choices=["single_label_classification", "multi_label_classification", "regression"],
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    logging.disable_progress_bar()
    count = args.examples + args.validation
    texts = make_texts(args.classes, count, args.seed, args.problem_type)
    random.Random(args.seed).shuffle(texts)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"train": texts[: args.examples], "validation": texts[args.examples :]}
    for name, part in parts.items():
        lines = "".join(json.dumps(text) + "\n" for text in part)
        (args.out / f"{name}.jsonl").write_text(lines)
    make_models(args.out, [text["text"] for text in parts["train"]])
    print(
        f"{args.out}: {args.examples} texts to train on and {args.validation} held out, "
        f"{args.classes} classes; olmo2-tiny/ and modernbert-tiny/"
    )


if __name__ == "__main__":
    main()
