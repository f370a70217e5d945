"""Train a model in three legs: OLMo-core, Megatron, OLMo-core; and compare with OLMo-core alone.

    python relay.py FOLDER

FOLDER gets the tokens, each leg's checkpoints, and ``relay.png``: the losses of the three legs on
those of a run that OLMo-core did alone. Needs ``ai2-olmo-core`` beside this package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
HANDOVERS = 25, 50
LAST = 75
RECIPE = "from megatron_olmo_bridge.training.config import TrainingConfig as config\n"
"""Every setting at its default: those of OLMo-core's run are taken from its checkpoint."""


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder}: exists already; name a new folder")
    if find_spec("olmo_core") is None:
        sys.exit("OLMo-core is not installed: make relay-demo sets up an environment with it")
    tokens = folder / "tokens"
    tokens.mkdir(parents=True)
    write_tokens(tokens)
    first, second = HANDOVERS
    print(f"OLMo-core alone: {LAST} steps", flush=True)
    olmo_core(tokens, folder / "alone", stop=LAST)
    print(f"leg 1: OLMo-core, steps 1 to {first}", flush=True)
    olmo_core(tokens, folder / "leg-1", stop=first)
    print(f"leg 2: Megatron on 2 processes (TP 2), steps {first + 1} to {second}", flush=True)
    megatron(tokens, folder / "leg-1", folder / "leg-2", stop=second)
    print(f"leg 3: OLMo-core, steps {second + 1} to {LAST}", flush=True)
    olmo_core(tokens, folder / "leg-3", stop=LAST, load=folder / f"leg-2/olmo-core/step{second}")
    alone = losses(folder / "alone")
    legs = {
        "leg 1: OLMo-core": losses(folder / "leg-1"),
        "leg 2: Megatron, TP 2": megatron_losses(folder / "leg-2"),
        "leg 3: OLMo-core": losses(folder / "leg-3"),
    }
    draw(alone, legs, folder / "relay.png")
    for name, leg in legs.items():
        most = max(leg, key=lambda step: abs(leg[step] - alone[step]))
        print(f"{name}: losses differ by at most {abs(leg[most] - alone[most]):.1e} (step {most})")
    print(f"Drawn: {folder / 'relay.png'}")


def write_tokens(folder: Path) -> None:
    """Write the documentation of this project as tokens of one byte each, in two files."""
    texts = sorted(HERE.parents[1].glob("docs/*.md"))
    for i in range(2):
        data = b"\0".join(file.read_bytes() for file in texts[i::2])
        np.frombuffer(data, np.uint8).tofile(folder / f"part-{i}.npy")
    (folder / "mix.txt").write_text("part-0.npy\npart-1.npy\n")


def olmo_core(tokens: Path, save: Path, stop: int, load: Path | None = None) -> None:
    command = [sys.executable, HERE / "olmo_core_leg.py", tokens, save, "--stop", str(stop)]
    run([*command, *(["--load", load] if load else [])], save.with_suffix(".log"))


def megatron(tokens: Path, begin: Path, save: Path, stop: int) -> None:
    save.mkdir()
    (save / "recipe.py").write_text(RECIPE)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
        "megatron_olmo_bridge", "train", save / "recipe.py",
        f"init.checkpoint={begin}", "init.optimizer=true", f"data.mix={tokens / 'mix.txt'}",
        f"train.steps={stop}", f"schedule.end_step={LAST}", "train.precision=float32",
        "train.micro_batch_size=8", "parallel.tp=2", "logging.interval=1",
        f"checkpoint.save={save / 'run'}", f"export.olmo_core={save / 'olmo-core'}",
    ]  # fmt: skip
    run(command, save.with_suffix(".log"))


def run(command: list[str | Path], log: Path) -> None:
    """Run a command, with its output in a file that is shown if it fails."""
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"{log.read_text()[-3000:]}\n{log}: failed with exit code {code}")


def losses(run: Path) -> dict[int, float]:
    values = json.loads((run / "losses.json").read_text())
    return {int(step): loss for step, loss in values.items() if int(step) > 0}


def megatron_losses(leg: Path) -> dict[int, float]:
    lines = map(json.loads, (leg / "run/log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def draw(alone: dict[int, float], legs: dict[str, dict[int, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, sharex=True, figsize=(8, 6), height_ratios=(3, 2), layout="constrained"
    )
    above.plot(list(alone), list(alone.values()), color="0.75", lw=6, label="OLMo-core alone")
    for name, leg in legs.items():
        (line,) = above.plot(list(leg), list(leg.values()), lw=1.5, label=name)
        # Zero has no place on a logarithmic axis.
        gaps = [max(abs(leg[step] - alone[step]), 1e-9) for step in leg]
        below.semilogy(list(leg), gaps, ".", color=line.get_color())
    above.set_ylabel("loss (nats per token)")
    above.legend(frameon=False)
    below.set_ylabel("difference from OLMo-core alone")
    below.set_xlabel("step")
    below.set_ylim(5e-10, 1e-4)
    below.set_yticks([1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4])
    below.set_yticklabels(["equal", "1e-8", "1e-7", "1e-6", "1e-5", "1e-4"])
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
