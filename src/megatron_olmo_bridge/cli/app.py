"""Entry point of the command line; each other module here holds a group of commands."""

from __future__ import annotations

import typer

from . import checks, conversion, data, inference, recipes, training
from .command import CommandGroup
from .console import show_version

app = typer.Typer(
    name="olmo-bridge",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Move OLMo checkpoints between Hugging Face and Megatron, and prove nothing was lost.

    Try it on a small synthetic model:

    \b
      olmo-bridge synth olmo2-tiny hf
      olmo-bridge import hf megatron
      olmo-bridge export megatron back
      olmo-bridge verify hf back
      olmo-bridge compare hf megatron --tp 2
    """,
    epilog="Exit codes: 0 done, 1 a difference was found, 2 bad usage or input, 70 a bug in "
    "olmo-bridge, 75 training stopped and saved when asked to, 130 interrupted.",
)
conversion.add_to(app)
checks.add_to(app)
inference.add_to(app)
data.add_to(app)
recipes.add_to(app)
training.add_to(app)


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version."
    ),
) -> None: ...
