"""Commands that run a live model in megatron-core: compare, roundtrip, generate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_olmo_bridge.errors import InputError

from .command import DIFFERENT, Outcome, register
from .completion import dtypes, dtypes_or_keep
from .console import output, say, table

if TYPE_CHECKING:
    from megatron_olmo_bridge.inference.compare import Comparison, Layer

Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor parallel size: processes a layer.")]
Pp = Annotated[int, typer.Option("--pp", min=1, help="Pipeline parallel size: stages.")]
Sp = Annotated[bool, typer.Option("--sp", help="Sequence parallelism; needs --tp above 1.")]
Ep = Annotated[int, typer.Option("--ep", min=1, help="Expert parallel size.")]
SHOWN_LAYERS = 12
"""Layers of the table around the place where two models part; --json has all."""


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    needs = ("megatron", "transformers")
    register(app, "compare", compare, needs=needs, exit_codes=DIFFERENT)
    register(app, "roundtrip", roundtrip, needs=needs, exit_codes=DIFFERENT)
    register(app, "generate", generate, needs=needs)


def compare(
    hf: Annotated[str, typer.Argument(metavar="HF", help="The reference: a folder or a hub id.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="A checkpoint of either kind.")],
    tp: Tp = 1,
    pp: Pp = 1,
    sp: Sp = False,
    ep: Ep = 1,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16.", autocompletion=dtypes)
    ] = "float32",
    prompt: Annotated[str | None, typer.Option(help="Text to run on.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Random tokens, without a prompt.")] = 128,
    threshold: Annotated[
        float | None, typer.Option(help="Error that is allowed, instead of the default.")
    ] = None,
) -> Outcome:
    """Run HF in transformers and OTHER in megatron-core, and say where they part.

    In float32 the logits may differ by 1e-4 of the largest; in 16 bits by 1.2 times what
    transformers' own logits in that dtype differ from its float32. Exits with 1 past that.

    Examples:
        olmo-bridge compare ./hf ./megatron --tp 2
    """
    from megatron_olmo_bridge.inference.compare import compare as run

    found = run(
        hf, other, tp=tp, pp=pp, sp=sp, ep=ep, dtype=dtype, prompt=prompt, tokens=tokens,
        threshold=threshold,
    )  # fmt: skip
    _print_comparison(found)
    return Outcome(
        {"equal": found.equal, "parts_at": found.parts_at} | asdict(found),
        exit_code=0 if found.equal else 1,
    )


def _print_comparison(found: Comparison) -> None:
    table(
        ["", ""],
        [
            ["compared", f"{found.tokens} tokens in {found.dtype}"],
            ["largest logit error", f"{found.max_error:.3g} (largest logit {found.magnitude:.3g})"],
            ["mean logit error", f"{found.mean_error:.3g}"],
            ["top-1 agreement", f"{found.top1_agreement:.2%}"],
            ["KL divergence", f"{found.kl_divergence:.3g} nats"],
            *([["loss", f"{found.loss[0]:.6f} and {found.loss[1]:.6f}"]] if found.loss else []),
            *(["config differs", line] for line in found.config_differences),
        ],
    )
    say("")
    rows = [
        [x.name, f"{x.max_error:.3g}", f"{x.magnitude:.3g}", f"{x.error / x.allowed:.3g}",
         "differs" if x.parts else ""]
        for x in _shown(found.layers)
    ]  # fmt: skip
    table(["after", "largest error", "largest value", "error / allowed", ""], rows)
    say("")
    if found.equal:
        say("The same, but for rounding.")
    else:
        say(f"NOT the same. The hidden states part at: {found.parts_at}.")


def _shown(layers: list[Layer]) -> list[Layer]:
    """The first and last, and those around the place where they part."""
    parts = next((i for i, layer in enumerate(layers) if layer.parts), len(layers))
    begin = max(0, min(parts - 2, len(layers) - SHOWN_LAYERS))
    keep = {0, *range(begin, begin + SHOWN_LAYERS), len(layers) - 1}
    return [layer for i, layer in enumerate(layers) if i in keep]


def roundtrip(
    hf: Annotated[str, typer.Argument(metavar="HF", help="A folder or a hub id.")],
    tp: Tp = 1,
    pp: Pp = 1,
    sp: Sp = False,
    tokens: Annotated[int, typer.Option(min=2, help="To compare logits on.")] = 64,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For two copies of the model.")
    ] = None,
) -> Outcome:
    """Prove the way there and back: load, run, save with stock megatron-core, export, verify.

    Weights must be equal bit for bit, logits up to rounding. Exits with 1 if not.

    Examples:
        olmo-bridge roundtrip ./hf --tp 2 --pp 2
    """
    from megatron_olmo_bridge.inference.roundtrip import roundtrip as run

    found = run(hf, tp=tp, pp=pp, sp=sp, tokens=tokens, work=work,
                tell=lambda step: say(f"... {step}"))  # fmt: skip
    rows = [[s.name, "yes" if s.ok else "NO", s.result, f"{s.seconds:.1f} s"] for s in found.steps]
    table(["step", "ok", "result", "took"], rows)
    say("Nothing was lost." if found.ok else "NOT the same: see above.")
    return Outcome({"equal": found.ok} | asdict(found), exit_code=0 if found.ok else 1)


def generate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint of either kind, or a hub id.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids to continue, instead of text.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="To generate at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token each time; 1: as the model says.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="keep, float32, bfloat16 or float16.", autocompletion=dtypes_or_keep)
    ] = "keep",
    tp: Tp = 1,
    pp: Pp = 1,
) -> Outcome:
    """Continue a prompt with a live model; tokens appear as they come.

    Examples:
        olmo-bridge generate ./megatron --prompt "Language models are" --tp 2
    """
    from megatron_olmo_bridge.inference.generation import Generation

    if (prompt is None) == (tokens is None):
        raise InputError("give either --prompt TEXT or --tokens 1,2,3")
    run = Generation(checkpoint, prompt=prompt, tokens=_ids(tokens), dtype=dtype, tp=tp, pp=pp)
    for piece in run.stream(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    ):
        if not output.silent:
            typer.echo(piece, nl=False)
    say("")
    if output.quiet and not output.json:
        typer.echo(run.text if run.text is not None else " ".join(map(str, run.tokens)))
    return Outcome({"prompt": run.prompt, "tokens": run.tokens, "text": run.text})


def _ids(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r} is not a list of token ids such as 1,2,3") from None
