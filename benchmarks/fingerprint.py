"""Time the fingerprint next to sha256sum and openssl over the same bytes, with the same threads.

    python benchmarks/fingerprint.py --size olmo2-1b --rounds 5

All in interleaved rounds, from a warm page cache; each figure is of whole processes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from bench import measure

from megatron_olmo_bridge import import_checkpoint, synth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="olmo2-1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; default: /tmp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        hf = synth(args.size, Path(folder) / "hf", max_shard_size="500MB")
        import_checkpoint(hf, megatron := Path(folder) / "megatron")
        files = " ".join(map(str, sorted(hf.glob("*.safetensors"))))
        each = f"printf '%s\\n' {files} | xargs -P {args.threads} -n 1"
        ours = [sys.executable, "-m", "megatron_olmo_bridge", "fingerprint", "-j"]
        commands = {
            "sha256sum": ["sh", "-c", f"{each} sha256sum"],
            "openssl dgst -sha256": ["sh", "-c", f"{each} openssl dgst -sha256"],
            "fingerprint of Hugging Face": [*ours, str(args.threads), str(hf)],
            "fingerprint of Megatron": [*ours, str(args.threads), str(megatron)],
        }
        nbytes = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
        peak = {name: measure(command, watched=True)[1] for name, command in commands.items()}
        rounds = [
            {name: measure(command, watched=False)[0] for name, command in commands.items()}
            for _ in range(args.rounds)
        ]
    print("| command | seconds | GB/s | x sha256sum | peak MiB |\n|---|---|---|---|---|")
    for name in commands:
        seconds = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r["sha256sum"] / r[name] for r in rounds)
        rate = nbytes / seconds / 1e9
        print(f"| {name} | {seconds:.2f} | {rate:.2f} | {ratio:.2f} | {peak[name]:.0f} |")


if __name__ == "__main__":
    main()
