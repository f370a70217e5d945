"""Kill the conversion of a model of published size at many moments of its run, and resume it.

    python kill_full_size.py SRC WORK --kills 20

SRC is a Hugging Face checkpoint, for example of olmo2-1b; WORK is a folder on a disk with room for
four times its bytes. For import and for export, this measures uninterrupted runs, then kills a run
at KILLS evenly spaced moments and at each named point. Every command must refuse the leftovers, and
the resumed tree must equal that of the uninterrupted run byte for byte. Prints one line for each
kill; exits with 1 if a check fails.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from killing import (
    KILLED,
    accepted,
    finish,
    finished,
    kill_after,
    left_by,
    measured,
    same,
    start,
)

POINTS = {
    "allocated": "after the allocation",
    "data:HALF": "in the middle of the data",
    "text:2": "among the small files",
    "rename": "before the rename",
    "tracker": "between the rename and the tracker",
    "marker": "before the marker is removed",
}
BETWEEN_RENAMES = "with --overwrite, between the two renames"


class FailureError(Exception):
    """A check failed."""


def kills(operation: str, source: Path, dst: Path, whole: Path, count: int) -> Iterator[str]:
    """Kill, check, resume and compare; yield a line for each kill."""
    arguments = [operation, source, dst]
    first, second = measured([operation, source, whole]), measured(arguments)
    yield f"{operation}: uninterrupted {first:.2f} s, again {second:.2f} s: {judged(dst, whole)}"
    seconds = min(first, second)
    for i in range(count):
        moment = seconds * (i + 0.5) / count
        kill_after(start(arguments), moment)
        yield f"{operation}: at {moment:.2f} s: {aftermath(arguments, dst, whole)}"
    (plan,) = json.loads(finish(start([*arguments, "--dry-run", "--json"]))[1])["result"]["plans"]
    half = plan["tensors"] // 2
    for point, meaning in POINTS.items():
        killed_at(point.replace("HALF", str(half)), arguments)
        yield f"{operation}: {meaning}: {aftermath(arguments, dst, whole)}"
    dst.mkdir()
    (dst / "file").write_text("what was there before")
    killed_at("rename:2", [*arguments, "--overwrite"])
    yield f"{operation}: {BETWEEN_RENAMES}: {aftermath(arguments, dst, whole)}"


def killed_at(point: str, arguments: list[object]) -> None:
    code, said = finish(start(arguments, point))
    if code != KILLED:
        raise FailureError(f"was not killed at {point}: {said}")


def aftermath(arguments: list[object], dst: Path, whole: Path) -> str:
    """Check that a killed run's leftovers are refused, resume it, and compare its output."""
    source = Path(str(arguments[1]))
    if finished(dst):
        said = "had finished"
    else:
        if wrong := accepted(dst, source):
            raise FailureError(f"accepted: {', '.join(wrong)}")
        names = [p.relative_to(dst.parent).as_posix() for p in left_by(dst) if p.exists()]
        said = f"refused {', '.join(names) or 'nothing: nothing was there'}"
        code, output = finish(start([*arguments, "--resume"]))
        if code:
            raise FailureError(f"{said}; could not be resumed: {output}")
    return f"{said}; {judged(dst, whole)}"


def judged(dst: Path, whole: Path) -> str:
    """Compare a tree with that of the uninterrupted run, then delete it."""
    if not same(dst, whole):
        raise FailureError(f"not identical: {dst} and {whole}")
    if beside := list(dst.parent.glob(f"{dst.name}.*")):
        raise FailureError(f"left behind: {beside}")
    shutil.rmtree(dst)
    return "identical yes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    megatron, hf = options.work / "megatron", options.work / "hf"
    begin, failures = time.monotonic(), 0
    try:
        for operation, source, whole in (
            ("import", options.source, megatron),
            ("export", megatron, hf),
        ):
            for line in kills(operation, source, options.work / "dst", whole, options.kills):
                print(line, flush=True)
    except FailureError as error:
        print(f"FAILED: {error}", flush=True)
        failures = 1
    else:
        for folder in (megatron, hf):
            shutil.rmtree(folder)
    print(f"{'FAILED' if failures else 'all checks passed'}, {time.monotonic() - begin:.0f} s")
    return failures


if __name__ == "__main__":
    sys.exit(main())
