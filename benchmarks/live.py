"""Time loading a Hugging Face checkpoint into a live Megatron model, and the memory that it takes.

The yardstick is one process that loads every tensor of the same files with safetensors and clones
it. Both in interleaved rounds, from a warm page cache; of both only the loading is timed, not the
interpreter's start.

    python benchmarks/live.py --size olmo2-1b --tp 2 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def yardstick(hf: Path) -> dict[str, float]:
    """Load and clone every tensor."""
    from safetensors import safe_open

    begin, kept = time.monotonic(), []
    for file in sorted(hf.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            kept += [tensors.get_tensor(name).clone() for name in tensors.keys()]  # noqa: SIM118
    return {"seconds": time.monotonic() - begin}


class AnonymousMemory(threading.Thread):
    """Watches RssAnon of this process: memory of its own, without mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.now()
        self.start()

    @staticmethod
    def now() -> int:
        """Bytes."""
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def live(hf: Path, tp: int) -> dict[str, float] | None:
    """Build the model and load it; the slowest rank's seconds, and all ranks' memory."""
    import torch.distributed as dist

    from megatron_olmo_bridge import AutoBridge
    from megatron_olmo_bridge.runtime.process_groups import ensure_process_groups

    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.perform_initialization = False
    provider.tensor_model_parallel_size = tp
    ensure_process_groups(provider)
    memory = AnonymousMemory()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    dist.barrier()
    begin = time.monotonic()
    bridge.load_hf_weights(model)
    seconds = time.monotonic() - begin
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (seconds, memory.peak - memory.before))
    if dist.get_rank():
        return None
    return {"seconds": max(s for s, _ in found), "anonymous_bytes": sum(m for _, m in found)}


def started(role: str, hf: Path, tp: int) -> dict[str, float]:
    """One of the two above, in processes of its own."""
    command = [sys.executable]
    if role == "live":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(tp)]
    command += [__file__, "--role", role, "--hf", str(hf), "--tp", str(tp)]
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if role == "live" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="olmo2-1b", help="a name that olmo-bridge synth knows")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bench-output"))
    parser.add_argument("--role", choices=("yardstick", "live"), help=argparse.SUPPRESS)
    parser.add_argument("--hf", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        found = yardstick(args.hf) if args.role == "yardstick" else live(args.hf, args.tp)
        if found is not None:
            print(json.dumps(found), flush=True)
        return
    hf = args.work / f"{args.size}-{args.dtype}-live" / "hf"
    if not hf.exists():
        command = [sys.executable, "-m", "megatron_olmo_bridge", "synth", args.size, str(hf)]
        subprocess.run([*command, "--dtype", args.dtype], check=True)
    size = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
    roles = ["yardstick", "live"]
    rounds: dict[str, list[dict[str, float]]] = {role: [] for role in roles}
    for number in range(args.rounds):
        for role in roles if number % 2 == 0 else reversed(roles):
            for file in hf.glob("*.safetensors"):
                subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
            rounds[role].append(started(role, hf, args.tp))
            print(f"round {number + 1}: {role:10s}{rounds[role][-1]['seconds']:7.2f} s", flush=True)
    medians = {r: statistics.median(x["seconds"] for x in found) for r, found in rounds.items()}
    memory = max(x["anonymous_bytes"] for x in rounds["live"])
    print(f"\n{args.size} {args.dtype} ({size / 1e9:.2f} GB), warm source: medians of")
    print(f"{args.rounds} interleaved rounds, {os.cpu_count()} CPUs, {platform.platform()}")
    print(f"load and clone with safetensors   {medians['yardstick']:7.2f} s")
    print(f"load into a live model at TP {args.tp}    {medians['live']:7.2f} s", end="")
    print(f"   {medians['live'] / medians['yardstick']:.2f} x")
    print(f"anonymous memory of all ranks     {memory / size:7.2f} x the model, at its peak")


if __name__ == "__main__":
    main()
