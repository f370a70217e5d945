"""Flip bytes of a checkpoint, one at a time: ``flipped_bytes.py FOLDER COUNT``

Half of the positions are spread evenly over all bytes, half over the files, so that small files
are covered too. The check that a run makes before it resumes must find each flip and name the file.
Prints how many flips were found.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from megatron.core import ModelParallelConfig

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.runtime.process_groups import ensure_process_groups
from megatron_olmo_bridge.training.checksums import check


def main() -> None:
    _, folder, count = sys.argv
    ensure_process_groups(ModelParallelConfig())
    check(Path(folder))
    flips = [found(Path(folder), *place) for place in places(Path(folder), int(count))]
    check(Path(folder))
    print(f"{sum(flips)} of {len(flips)} found")


def places(folder: Path, count: int) -> list[tuple[Path, int]]:
    """Return files and offsets to damage."""
    chance = random.Random(0)
    sizes = {p: p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files = chance.choices(list(sizes), list(sizes.values()), k=count // 2)
    files += chance.choices(list(sizes), k=count - count // 2)
    return [(file, chance.randrange(sizes[file])) for file in files]


def found(folder: Path, file: Path, offset: int) -> bool:
    flip(file, offset)
    try:
        check(folder)
    except FormatError as error:
        return file.name in str(error)
    finally:
        flip(file, offset)
    return False


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        (byte,) = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte ^ 0x10]))
