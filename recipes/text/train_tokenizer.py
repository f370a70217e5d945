"""Train a tokenizer on text files and save it as transformers loads it. Needs no network.

    python train_tokenizer.py OUT TEXT... --vocab-size 1024

It is a byte-level BPE tokenizer, as OLMo's and GPT-2's: any text can be tokenized, and decoded
again without loss. It has one special token, eos, which ends each document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"


def texts(files: list[Path]) -> Iterator[str]:
    """Documents of .jsonl files, lines of any others."""
    for path in files:
        with path.open() as file:
            for line in file:
                yield json.loads(line)["text"] if path.suffix == ".jsonl" else line.rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path, nargs="+", help=".jsonl or .txt")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens at most")
    args = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(args.text), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(args.out)
    example = next(texts(args.text))[:60]
    print(f"{args.out}: {tokenizer.get_vocab_size():,} tokens. {example!r} becomes")
    print(f"  {tokenizer.encode(example).tokens}")


if __name__ == "__main__":
    main()
