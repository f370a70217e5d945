"""Fetch the complaints that consumers sent to the CFPB, and make labelled texts of them.

    python examples/classification/fetch_complaints.py OUT --classes 113 --limit 200000

The Consumer Financial Protection Bureau of the United States publishes them, without personal data
and with the consumer's consent: https://www.consumerfinance.gov/data-research/consumer-complaints/
OUT gets train.jsonl and validation.jsonl with ``text`` and ``label``, and keeps the archive (about
a gigabyte), so that a second run needs no network. Every class is in both files, in the same
proportion. The standard library is all it takes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import random
import sys
import urllib.error
import urllib.request
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

URL = "https://files.consumerfinance.gov/ccdb/complaints.csv.zip"
ARCHIVE = "complaints.csv.zip"
TEXT = "Consumer complaint narrative"
BLOCK = 1 << 20


def fetch(url: str, file: Path) -> None:
    """Download, unless it is there already; a broken download leaves nothing."""
    if file.exists():
        return
    partial = file.with_name(file.name + ".partial")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "megatron-olmo-bridge"})
        with urllib.request.urlopen(request, timeout=60) as source, partial.open("wb") as target:
            total = int(source.headers.get("Content-Length") or 0)
            while block := source.read(BLOCK):
                target.write(block)
                if sys.stderr.isatty():
                    of = f" of {total / 1e6:.0f}" if total else ""
                    print(f"\r{target.tell() / 1e6:.0f}{of} MB", end="", file=sys.stderr)
        if total and partial.stat().st_size != total:
            raise OSError("it broke off")
    except (OSError, urllib.error.URLError) as error:
        partial.unlink(missing_ok=True)
        sys.exit(
            f"{url}: can't be fetched: {getattr(error, 'reason', error)}. Fetch it where there is "
            f"a network and put it there as {file}, or make synthetic data: make_synthetic.py"
        )
    partial.rename(file)


def read(archive: Path, label: str) -> Iterator[tuple[str, str]]:
    """Text and label of each complaint that has both."""
    csv.field_size_limit(1 << 24)
    try:
        with zipfile.ZipFile(archive) as files:
            name = next(n for n in files.namelist() if n.endswith(".csv"))
            with files.open(name) as raw:
                rows = csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))
                missing = {TEXT, label} - set(rows.fieldnames or ())
                if missing:
                    sys.exit(f"{archive}: no column {missing.pop()!r}; it has {rows.fieldnames}")
                for row in rows:
                    text, name = (row[TEXT] or "").strip(), (row[label] or "").strip()
                    if text and name:
                        yield text, name
    except (zipfile.BadZipFile, StopIteration) as error:
        sys.exit(
            f"{archive}: not a zip archive with a .csv in it; delete it and try again: {error}"
        )


def choose(
    archive: Path, label: str, classes: int, limit: int, rng: random.Random
) -> list[tuple[str, str]]:
    """At most ``limit`` different complaints of the most frequent classes, shuffled.

    The archive is read twice, so that not all its texts have to be in memory.
    """
    different: dict[bytes, tuple[int, str]] = {}  # the same letter is often sent many times
    for row, (text, name) in enumerate(read(archive, label)):
        different.setdefault(hashlib.blake2b(text.encode(), digest_size=8).digest(), (row, name))
    counts = Counter(name for _, name in different.values())
    kept = {name for name, _ in counts.most_common(classes)}
    rows = [row for row, name in different.values() if name in kept]
    chosen = set(rng.sample(rows, min(limit, len(rows))))
    examples = [e for row, e in enumerate(read(archive, label)) if row in chosen]
    rng.shuffle(examples)
    return examples


def split(
    examples: list[tuple[str, str]], share: float
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split into training and held-out examples, the same share of each class. Classes with fewer
    than two examples are dropped."""
    of_class = defaultdict(list)
    for example in examples:
        of_class[example[1]].append(example)
    held_out: set[tuple[str, str]] = set()
    alone: set[str] = set()
    for label, members in of_class.items():
        if len(members) < 2:
            alone.add(label)
        held_out.update(members[: max(1, round(len(members) * share))])
    together = [e for e in examples if e[1] not in alone]
    return [e for e in together if e not in held_out], [e for e in together if e in held_out]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--label", default="Issue", help='column: "Issue", "Sub-product", "Product"'
    )
    parser.add_argument("--classes", type=int, default=113, help="the most frequent ones")
    parser.add_argument("--limit", type=int, default=200_000, help="complaints in all")
    parser.add_argument("--validation", type=float, default=0.1, help="share that is held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", default=URL)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    fetch(args.url, args.out / ARCHIVE)
    rng = random.Random(args.seed)
    examples = choose(args.out / ARCHIVE, args.label, args.classes, args.limit, rng)
    parts = dict(zip(("train", "validation"), split(examples, args.validation), strict=True))
    for name, part in parts.items():
        with (args.out / f"{name}.jsonl").open("w") as file:
            for text, label in part:
                file.write(json.dumps({"text": text, "label": label}) + "\n")
    classes = len({label for _, label in parts["train"]})
    print(
        f"{args.out}: {len(parts['train'])} complaints to train on and {len(parts['validation'])} "
        f"held out, {classes} classes"
    )


if __name__ == "__main__":
    main()
