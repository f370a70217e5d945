"""Make text that a small model can learn: short stories of a seeded grammar. Needs no network.

    python make_text.py OUT --megabytes 3

OUT gets train-1.jsonl, train-2.jsonl.gz and train-3.txt (a story on each line), a third of the text
each, and held-out.jsonl: stories of the same kind that are in none of the others.

There is more to learn than which words are frequent: what follows what in a sentence, and that a
story keeps to its own hero, friend, thing and places, which it drew at its beginning.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path

GRAMMAR = {
    "story": [
        "<once>, <HERO> <found> a <ADJECTIVE> <THING> <in> <PLACE>. <turn> <turn> <end>",
        "<HERO> and <FRIEND> lived <in> <PLACE>. <turn> <turn> <turn> <end>",
        "<HERO> of <TOWN> had a <THING>, and it was <ADJECTIVE>. <turn> <turn> <turn> <turn> <end>",
    ],
    "once": ["Once upon a time", "One <time>", "Long ago", "On a <weather> <time>", "Last winter"],
    "time": ["morning", "evening", "summer day", "night", "afternoon"],
    "weather": ["cold", "rainy", "bright", "windy", "quiet", "foggy"],
    "found": ["found", "saw", "bought", "lost", "hid", "heard of"],
    "in": ["in", "near", "behind", "outside"],
    "turn": [
        "<who> <went> from <PLACE> to <GOAL> with the <THING>.",
        'But <who> was <mood>. "Where is my <THING>?" asked <HERO>. '
        '"It is <in> <GOAL>," said <FRIEND>.',
        '"<greeting>, <FRIEND>," said <HERO>, "will you come with me to <GOAL>?"',
        "It was <weather>, so <who> <did> until the <time>.",
        "Then <FRIEND> <found> <number> <things> and gave <some> to <HERO>.",
        "The way to <GOAL> was <long>, and <who> <did>.",
        "They <went> to <TOWN>, where <number> <things> were as <ADJECTIVE> as the <THING>.",
        "<HERO> counted: <count>.",
    ],
    "who": ["<HERO>", "<HERO>", "<FRIEND>", "everybody in <TOWN>"],
    "went": ["went", "walked", "ran", "travelled", "rode"],
    "did": ["slept", "sang a song", "told a story", "waited", "read a book", "ate bread and soup"],
    "mood": ["sad", "angry", "very tired", "full of hope", "afraid", "not surprised"],
    "greeting": ["Good morning", "Hello", "Listen", "Dear friend"],
    "long": ["long", "steep", "dark", "not far", "covered with snow"],
    "number": ["two", "three", "four", "five", "seven", "a hundred"],
    "some": ["one", "all of them", "half of them", "the best of them"],
    "count": ["one, two, three", "one, two, three, four", "one, two, three, four, five"],
    "things": ["apples", "letters", "stones", "coins", "candles", "horses", "maps"],
    "end": [
        "So the <THING> stayed <in> <GOAL>, and <HERO> was happy.",
        "In the end <HERO> and <FRIEND> brought the <ADJECTIVE> <THING> back to <PLACE>.",
        "Nobody in <TOWN> has seen <FRIEND> or the <THING> since.",
        "And <HERO> of <TOWN> never went to <GOAL> again.",
    ],
    # Drawn once a story; the first are the most frequent, as words are in any language.
    "PERSON": [
        "Anna", "Tom", "Maria", "King Olaf", "Peter", "Miller Jack", "Lucy", "Doctor Brown", "Ivan",
        "Captain Reed", "Grandmother", "Noor", "Sister Agnes", "Samuel", "Mister Fox",
    ],
    "THING": [
        "key", "book", "lamp", "boat", "clock", "ring", "violin", "letter", "basket", "mirror",
        "map of the sea", "wooden bird", "coat", "silver spoon",
    ],
    "WHERE": [
        "the forest", "the kitchen", "the market", "the river", "the castle", "the school",
        "the mountains", "the harbour", "the garden", "the railway station", "the library",
    ],
    "ADJECTIVE": [
        "small", "golden", "old", "strange", "beautiful", "heavy", "broken", "green", "expensive",
    ],
}  # fmt: skip
SLOTS = {"HERO": "PERSON", "FRIEND": "PERSON", "PLACE": "WHERE", "GOAL": "WHERE"}


def story(rng: random.Random) -> str:
    """Return a story of 100 to 200 words."""
    drawn = {"TOWN": town(rng)}

    def expand(found: re.Match[str]) -> str:
        name = found[1]
        if name.islower():
            return fill(rng.choice(GRAMMAR[name]))
        if name not in drawn:
            taken = set(drawn.values())
            options = [o for o in GRAMMAR[SLOTS.get(name, name)] if o not in taken]
            drawn[name] = rng.choices(options, [1 / (i + 1) for i in range(len(options))])[0]
        return drawn[name]

    def fill(text: str) -> str:
        return re.sub(r"<(\w+)>", expand, text)

    sentences = " ".join(fill("<story>") for _ in range(rng.randint(1, 2)))
    return re.sub(r'(^|[.?] "?)([a-z])', lambda m: m[1] + m[2].upper(), sentences)


def town(rng: random.Random) -> str:
    """A made-up name, which no vocabulary has as one token."""
    parts = ["al", "ber", "cor", "den", "fal", "gri", "hol", "kam", "lin", "mor", "ost", "ver"]
    ends = ["burg", "ton", "field", "stad", "mouth", "ville"]
    return ("".join(rng.choices(parts, k=rng.randint(1, 2))) + rng.choice(ends)).capitalize()


def stories(characters: int, seed: int, without: frozenset[str] = frozenset()) -> list[str]:
    """Return distinct stories with about N characters in total."""
    rng = random.Random(seed)
    made: dict[str, None] = {}
    while characters > 0:
        text = story(rng)
        if text not in without and text not in made:
            made[text] = None
            characters -= len(text)
    return list(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=3.0, help="to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train = stories(int(args.megabytes * 1e6), args.seed)
    held_out = stories(int(args.megabytes * 1e5), args.seed + 1, without=frozenset(train))
    lines = [json.dumps({"text": text}) + "\n" for text in train]
    third = len(train) // 3
    (args.out / "train-1.jsonl").write_text("".join(lines[:third]))
    with gzip.open(args.out / "train-2.jsonl.gz", "wt") as file:
        file.writelines(lines[third : 2 * third])
    (args.out / "train-3.txt").write_text("\n".join(train[2 * third :]) + "\n")
    (args.out / "held-out.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in held_out)
    )
    print(f"{args.out}: {len(train):,} stories to train on, {len(held_out):,} held out. The first:")
    print(f"  {train[0]}")


if __name__ == "__main__":
    main()
