"""Time import and export next to ``cp -r`` of the same bytes, and take their peak memory.

Each is a whole process and ends with its files synced. The rounds are interleaved, so that what
slows the machine slows all alike; each begins with its source out of the page cache (or in it), and
cp changes its place from round to round, since who comes first finds freed memory. Memory is
summed over the process tree every 10 ms, in a round more whose times don't count.

    python benchmarks/bench.py --size olmo2-7b
    python benchmarks/bench.py --size olmo2-1b --dtype float32 --to bfloat16
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

COPY = (
    "import os, pathlib, shutil, subprocess, sys\n"
    "subprocess.run(['cp', '-r', *sys.argv[1:]], check=True)\n"
    "for f in pathlib.Path(sys.argv[2]).rglob('*'):\n"
    "    if f.is_file():\n"
    "        fd = os.open(f, os.O_RDONLY); os.fsync(fd); os.close(fd)\n"
)


def measure(command: list[str], watched: bool) -> tuple[float, float]:
    """Wall seconds and, if watched, peak MiB of resident memory of a process and its children.

    Watching takes a share of a core, so it is done in a round whose times don't count.
    """
    begin, peak = time.perf_counter(), 0
    with psutil.Popen(command, stdout=subprocess.DEVNULL) as process:
        while watched and process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                tree = [process, *process.children(recursive=True)]
                peak = max(peak, sum(p.memory_info().rss for p in tree))
            time.sleep(0.01)
        process.wait()
        seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"failed with {process.returncode}: {' '.join(command)}")
    return seconds, peak / 2**20


def set_cache(folder: Path, state: str) -> None:
    """Put all of a source into the page cache, or nothing of it: the same for cp as for us."""
    subprocess.run(["sync"], check=True)
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as handle:
                if state == "cold":
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while state == "warm" and handle.read(8 << 20):
                    pass


def run_rounds(args: argparse.Namespace, work: Path) -> dict[str, list[tuple[float, float]]]:
    hf, copied, megatron, back = (work / n for n in ("hf", "copy", "megatron", "back"))
    bridge = [sys.executable, "-m", "megatron_olmo_bridge"]
    options = ["--quiet", *(["--workers", str(args.workers)] if args.workers else [])]
    commands = {
        "cp -r": [sys.executable, "-c", COPY, str(hf), str(copied)],
        "import": [*bridge, "import", str(hf), str(megatron), "--dtype", args.to, *options],
        "export": [*bridge, "export", str(megatron), str(back), *options],
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(args.rounds + 1):
        order = ["import", "export"]
        order.insert(number % 3, "cp -r")
        for name in order:
            watched = args.tight or number == args.rounds
            set_cache(megatron if name == "export" else hf, args.cache)
            results[name].append(measure(commands[name], watched))
            seconds, memory = results[name][-1]
            said = f"{memory:6.0f} MiB" if watched else ""
            print(f"round {number + 1}: {name:7} {seconds:7.2f} s  {said}", flush=True)
            if name != "import":  # the export reads what the import wrote
                shutil.rmtree(copied if name == "cp -r" else back)
            if args.tight and number == 0 and name == "import":
                shutil.rmtree(hf)
        shutil.rmtree(megatron)
        if args.tight:
            break
    return results


def summarise(results: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and the median of the ratios to the cp of the same round; the last one, in which
    memory was watched, only counts for memory."""
    timed = {name: runs[:-1] or runs for name, runs in results.items()}
    copies = [seconds for seconds, _ in timed["cp -r"]]
    return {
        name: {
            "seconds": statistics.median(s for s, _ in timed[name]),
            "ratio_to_cp": statistics.median(
                s / c for (s, _), c in zip(timed[name], copies, strict=True)
            ),
            "peak_mib": max(m for _, m in runs),
        }
        for name, runs in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="olmo2-1b", help="a name that olmo-bridge synth knows")
    parser.add_argument("--dtype", default="bfloat16", help="of the source")
    parser.add_argument("--to", default="keep", help="import --dtype")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of import and export; else their default")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="of the source")
    parser.add_argument("--work", type=Path, default=Path("bench-output"), help="where to write")
    parser.add_argument(
        "--tight", action="store_true", help="one round on a disk that holds just two copies"
    )
    parser.add_argument("--json", type=Path, help="else WORK/<size>-<dtype>-<to>-<cache>.json")
    args = parser.parse_args()
    args.rounds = 1 if args.tight else args.rounds
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work / f"{args.size}-{args.dtype}"
    shutil.rmtree(work, ignore_errors=True)
    synth = [sys.executable, "-m", "megatron_olmo_bridge", "synth", args.size, str(work / "hf")]
    subprocess.run([*synth, "--dtype", args.dtype], check=True)
    nbytes = sum(f.stat().st_size for f in (work / "hf").iterdir())
    try:
        results = run_rounds(args, work)
    finally:
        shutil.rmtree(work)
    summary = summarise(results)
    print(
        f"\n{args.size} {args.dtype} ({nbytes / 1e9:.2f} GB), import to {args.to}, "
        f"{args.cache} source: medians of"
    )
    print(f"{args.rounds} interleaved rounds, {os.cpu_count()} CPUs, {platform.platform()}")
    print(f"{'':8}{'seconds':>9}{'x cp -r':>9}{'peak MiB':>10}")
    for name, row in summary.items():
        print(f"{name:8}{row['seconds']:9.2f}{row['ratio_to_cp']:9.2f}{row['peak_mib']:10.0f}")
    out = args.json or args.work / f"{args.size}-{args.dtype}-{args.to}-{args.cache}.json"
    machine = {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    out.write_text(
        json.dumps(
            {
                "size": args.size,
                "dtype": args.dtype,
                "to": args.to,
                "cache": args.cache,
                "bytes": nbytes,
                "machine": machine,
                "summary": summary,
                "rounds": results,
            },
            indent=2,
        )
        + "\n"
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
