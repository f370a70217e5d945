"""Commands that run a model in megatron-core: compare, roundtrip, generate."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from megatron_olmo_bridge.errors import InputError

from .command import DIFFERENT, Outcome, register
from .completion import dtypes, dtypes_or_keep
from .console import output, say, table

if TYPE_CHECKING:
    from megatron_olmo_bridge.inference.difference import Comparison, Layer

P = ParamSpec("P")
Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor parallel size: processes per layer.")]
Pp = Annotated[int, typer.Option("--pp", min=1, help="Pipeline parallel size: stages.")]
Sp = Annotated[bool, typer.Option("--sp", help="Sequence parallelism; needs --tp above 1.")]
Ep = Annotated[int, typer.Option("--ep", min=1, help="Expert parallel size.")]
SHOWN_LAYERS = 12
"""Layers to show around the first one that differs; --json lists all."""


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    needs = ("megatron", "transformers")
    register(app, "compare", _terminable(compare), needs=needs, exit_codes=DIFFERENT)
    register(app, "roundtrip", _terminable(roundtrip), needs=needs, exit_codes=DIFFERENT)
    register(app, "generate", _terminable(generate), needs=needs)


def _terminable(function: Callable[P, Outcome]) -> Callable[P, Outcome]:
    """Raise an exception on SIGTERM and SIGHUP, as Ctrl-C does.

    This ends the command's child processes and removes its temporary files.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Outcome:
        before = {n: signal.signal(n, _leave) for n in (signal.SIGTERM, signal.SIGHUP)}
        try:
            return function(*args, **kwargs)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # as shells report a process ended by a signal


def _show_step(step: str) -> None:
    """Print the step that begins, if standard error is a terminal."""
    if sys.stderr.isatty() and not output.quiet:
        typer.echo(f"... {step}", err=True)


def compare(
    hf: Annotated[str, typer.Argument(metavar="HF", help="The reference: a folder or a hub id.")],
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="A checkpoint of any kind, or a hub id.")
    ],
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
        float | None,
        typer.Option(
            min=0.0,
            help="Allowed error in float32; in 16 bits, a multiple of transformers' own error.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the error per layer.")
    ] = None,
) -> Outcome:
    """Run HF in transformers and OTHER in megatron-core, and report where they differ.

    The weights are compared too: a layer may differ because its weights do.

    In float32 the logits may differ by 1e-4 of the largest; in 16 bits by 1.5 times (mixtures of
    experts: 2 times) the difference between transformers' own logits in that dtype and in float32.
    Exits with 1 if they differ by more.

    Examples:
        olmo-bridge compare ./hf ./megatron --tp 2
    """
    from megatron_olmo_bridge.inference.compare import compare as run

    from .comparison_page import comparison_page
    from .pages import check_page, write_page

    check_page(html)
    comparison = run(
        hf,
        other,
        tp=tp,
        pp=pp,
        sp=sp,
        ep=ep,
        dtype=dtype,
        prompt=prompt,
        tokens=tokens,
        threshold=threshold,
        tell=_show_step,
    )
    if html is not None:
        write_page(html, comparison_page(comparison, hf, other))
    _print_comparison(comparison)
    return Outcome(
        {"equal": comparison.equal, "parts_at": comparison.differs_from} | asdict(comparison),
        exit_code=0 if comparison.equal else 1,
    )


def _print_comparison(comparison: Comparison) -> None:
    from megatron_olmo_bridge.inference.weights import summarize

    logits = comparison.layers[-1]
    table(
        ["", ""],
        [
            ["compared", f"{comparison.tokens} tokens in {comparison.dtype}"],
            [
                "largest logit error",
                f"{comparison.max_error:.3g} (largest logit {comparison.magnitude:.3g})",
            ],
            ["mean logit error", f"{comparison.mean_error:.3g}"],
            ["logits judged by", comparison.measure],
            ["found, allowed", f"{logits.error:.3g}, {logits.allowed:.3g} ({comparison.bound})"],
            ["top-1 agreement", f"{comparison.top1_agreement:.2%}"],
            ["KL divergence", f"{comparison.kl_divergence:.3g} nats"],
            ["weights", summarize(comparison.weights)],
            *(
                [["loss", f"{comparison.loss[0]:.6f} and {comparison.loss[1]:.6f}"]]
                if comparison.loss
                else []
            ),
            *(["config differs", line] for line in comparison.config_differences),
        ],
    )
    say("")
    rows = [
        [
            x.name,
            f"{x.max_error:.3g}",
            f"{x.magnitude:.3g}",
            f"{x.share:.3g}",
            "differs" if x.differs else "",
        ]
        for x in _shown(comparison.layers)
    ]
    table(["after", "largest error", "largest value", "error / allowed", ""], rows)
    say("")
    if comparison.equal:
        say(f"The same, but for rounding, on {comparison.tokens} tokens.")
    else:
        say(f"NOT the same. They differ from {comparison.differs_from} on.")


def _shown(layers: list[Layer]) -> list[Layer]:
    """Return the first and last layers, and those around the first one that differs."""
    parts = next((i for i, layer in enumerate(layers) if layer.differs), len(layers))
    begin = max(0, min(parts - 2, len(layers) - SHOWN_LAYERS))
    keep = {0, *range(begin, begin + SHOWN_LAYERS), len(layers) - 1}
    return [layer for i, layer in enumerate(layers) if i in keep]


def roundtrip(
    hf: Annotated[str, typer.Argument(metavar="HF", help="A folder or a hub id.")],
    tp: Tp = 1,
    pp: Pp = 1,
    sp: Sp = False,
    ep: Ep = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Number of tokens to compare logits on.")] = 64,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for two copies of the model.")
    ] = None,
) -> Outcome:
    """Prove a round trip: load, run, save with stock megatron-core, export, verify.

    Weights must be equal bit for bit, logits up to rounding. Exits with 1 if they are not.

    Examples:
        olmo-bridge roundtrip ./hf --tp 2 --pp 2
    """
    from megatron_olmo_bridge.inference.roundtrip import roundtrip as run

    result = run(hf, tp=tp, pp=pp, sp=sp, ep=ep, tokens=tokens, work=work, tell=_show_step)
    rows = [[s.name, "yes" if s.ok else "NO", s.result, f"{s.seconds:.1f} s"] for s in result.steps]
    table(["step", "ok", "result", "took"], rows)
    say("Nothing was lost." if result.ok else "NOT the same: see above.")
    return Outcome({"equal": result.ok} | asdict(result), exit_code=0 if result.ok else 1)


def generate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint of any kind, or a hub id.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids to continue, instead of text.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder or hub id; default: the checkpoint's own."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token; 1: unscaled.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="keep, float32, bfloat16 or float16.", autocompletion=dtypes_or_keep)
    ] = "keep",
    tp: Tp = 1,
    pp: Pp = 1,
) -> Outcome:
    """Continue a prompt; tokens are printed as they are generated.

    Examples:
        olmo-bridge generate ./megatron --prompt "Language models are" --tp 2
    """
    from megatron_olmo_bridge.inference.generation import Generation

    if (prompt is None) == (tokens is None):
        raise InputError("give either --prompt TEXT or --tokens 1,2,3")
    run = Generation(
        checkpoint,
        prompt=prompt,
        tokens=_ids(tokens),
        tokenizer=tokenizer,
        dtype=dtype,
        tp=tp,
        pp=pp,
    )
    for piece in run.stream(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        tell=_show_step,
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
