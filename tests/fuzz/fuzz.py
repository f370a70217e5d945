"""Give damaged files to the readers: ``make fuzz``, or ``python tests/fuzz/fuzz.py --help``.

A reader must refuse a damaged file with a message of at most one screen, or read the values that
the format's own library reads (or, if that library refuses the file, the values of the original
file). It must take less than 300 MiB and 2 seconds of processor time, and write nothing. Any other
outcome is a finding: its input is kept in a file, and the command that repeats it is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mutations
from hypothesis import HealthCheck, Phase, given, seed, settings
from isolated import Outcome, Worker
from targets import TARGETS, Target, build

from megatron_olmo_bridge.errors import MOST_CHARACTERS, fit_screen

MOST_SECONDS, MOST_BYTES = 2.0, 300 << 20
CASES_AT_ONCE = 100
"""Number of cases of a target before the next target."""


class Finding(Exception):  # noqa: N818
    """Case in which a reader breaks the rules above."""


class Fuzzer:
    """Run cases, count them and keep the findings."""

    def __init__(self, sound: Path, findings: Path, targets: list[Target]) -> None:
        self._sound, self._findings = sound, findings
        self._subject, self._reference = Worker("subject"), Worker("reference")
        self._expected = {t.name: self._accepted(t) for t in targets}
        self.counts: dict[str, Counter[str]] = {t.name: Counter() for t in targets}
        self.worst: dict[str, tuple[float, int]] = {t.name: (0.0, 0) for t in targets}
        self._known: set[str] = set()

    def close(self) -> None:
        """End the worker processes."""
        self._subject.close()
        self._reference.close()

    def _accepted(self, target: Target) -> Any:
        """Return the values read from the valid file, on which both readers must agree."""
        folder = self._sound / target.start
        read = self._subject.run(target.name, folder)
        assert read.ended == "accepted", (target.name, read)
        if target.reference is not None:
            self._ask(target, folder, read)
            reference = self._reference.run(target.name, folder)
            assert reference.value == read.value, (target.name, read, reference)
        return read.value

    @staticmethod
    def _ask(target: Target, folder: Path, read: Outcome) -> None:
        """Tell transformers which of its attributes are compared."""
        if target.name.startswith("config-"):
            (folder / "asked.json").write_text(json.dumps(list(read.value)))

    def check(self, target: Target, data: bytes) -> str:
        """Run a case and return its outcome.

        Raises:
            Finding: the property does not hold.
        """
        folder = self._sound / target.start
        file = folder / target.file
        sound = file.read_bytes()
        try:
            file.write_bytes(data)
            before = _listing(folder)
            read = self._subject.run(target.name, folder)
            self._judge(target, folder, read, wrote=before != _listing(folder))
        finally:
            file.write_bytes(sound)
        seconds, nbytes = self.worst[target.name]
        self.worst[target.name] = max(seconds, read.seconds), max(nbytes, read.nbytes)
        return read.ended

    def _judge(self, target: Target, folder: Path, read: Outcome, wrote: bool) -> None:
        if read.ended not in ("accepted", "refused"):
            raise Finding(f"{read.ended}: {read.message}")
        if read.seconds > MOST_SECONDS:
            raise Finding(f"time: {read.seconds:.1f} s of processor time")
        if read.nbytes > MOST_BYTES:
            raise Finding(f"memory: {read.nbytes >> 20} MiB")
        if wrote:
            raise Finding("written: the folder is not as it was")
        if read.ended == "refused":
            shown = fit_screen(read.message)
            if not shown.strip() or len(read.message) > 2 * MOST_CHARACTERS:
                raise Finding(f"message: {len(read.message)} characters: {shown[:500]}")
            return
        # A file that the library refuses may only be read as the valid file.
        expected = self._expected[target.name]
        if target.reference is not None:
            reference = self._reference.run(target.name, folder)
            if reference.ended == "accepted":
                expected = reference.value
        if read.value != expected:
            difference = _difference(read.value, expected)
            raise Finding(f"value: understood otherwise than by the reference: {difference}")

    def run(self, target: Target, number: int, cases: int) -> None:
        """Run cases of a target, the same ones for the same number, and keep the findings."""
        sound = (self._sound / target.start / target.file).read_bytes()
        counts = self.counts[target.name]

        @seed(number)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            print_blob=False,
            report_multiple_bugs=False,
        )
        @given(getattr(mutations, target.change)(sound))
        def holds(data: bytes) -> None:
            counts["cases"] += 1
            try:
                counts[self.check(target, data)] += 1
            except Finding as finding:
                if _kind(target, finding) in self._known:
                    return
                last.append((data, finding))
                raise

        last: list[tuple[bytes, Finding]] = []
        try:
            holds()
        except Finding:
            self._keep(target, *last[-1])

    def _keep(self, target: Target, data: bytes, finding: Finding) -> None:
        self._known.add(_kind(target, finding))
        self.counts[target.name]["findings"] += 1
        self._findings.mkdir(parents=True, exist_ok=True)
        file = self._findings / f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        file.write_bytes(data)
        print(
            f"\nFINDING {target.name}: {finding}\n"
            f"  run it again: python {Path(__file__)} --replay {file}",
            flush=True,
        )


def _kind(target: Target, finding: Finding) -> str:
    """Return what findings with the same cause share: the error's last line without numbers."""
    text = str(finding)
    where = re.findall(r'File ".*/(\w+\.py)", line (\d+)', text)[-1:]
    return f"{target.name} {where or re.sub('[0-9]+', 'N', text)[:60]}"


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {str(f.relative_to(folder)): f.lstat() for f in folder.rglob("*")}
    return {name: (s.st_size, s.st_mtime_ns) for name, s in stats.items()}


def _difference(value: Any, expected: Any) -> str:
    """Describe the first difference of two values."""
    if isinstance(value, dict) and isinstance(expected, dict):
        for key in [*value, *expected]:
            if value.get(key) != expected.get(key):
                return f"{key!r:.100}: {value.get(key)!r:.200} and not {expected.get(key)!r:.200}"
    return f"{value!r:.300} and not {expected!r:.300}"


def _print_table(fuzzer: Fuzzer) -> None:
    print(
        f"\n{'target':20}{'cases':>8}{'refused':>9}{'accepted':>9}{'findings':>9}"
        f"{'most s':>8}{'most MiB':>9}"
    )
    for name, counts in fuzzer.counts.items():
        seconds, nbytes = fuzzer.worst[name]
        columns = "".join(f"{counts[k]:9,}" for k in ("refused", "accepted", "findings"))
        print(f"{name:20}{counts['cases']:8,}{columns}{seconds:8.2f}{nbytes >> 20:9}")


def main() -> int:
    """Run cases until the time is over; return 1 after a finding, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed: the same cases")
    parser.add_argument("--target", choices=[t.name for t in TARGETS], action="append")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--replay", type=Path, help="a file that a finding was kept in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary))
        names = options.target or [t.name for t in TARGETS]
        if options.replay:
            names = [options.replay.name.rpartition("-")[0]]
        chosen = [t for t in TARGETS if t.name in names]
        fuzzer = Fuzzer(Path(temporary), options.findings, chosen)
        try:
            if options.replay:
                print(fuzzer.check(chosen[0], options.replay.read_bytes()))
                return 0
            end, number = time.monotonic() + options.seconds, options.seed
            while time.monotonic() < end:
                for target in chosen:
                    if time.monotonic() < end:
                        fuzzer.run(target, number, CASES_AT_ONCE)
                number += 1
                cases = sum(counts["cases"] for counts in fuzzer.counts.values())
                print(f"{cases:,} cases, {max(0, end - time.monotonic()):.0f} s left", flush=True)
            _print_table(fuzzer)
        finally:
            fuzzer.close()
    return int(any(counts["findings"] for counts in fuzzer.counts.values()))


if __name__ == "__main__":
    sys.exit(main())
