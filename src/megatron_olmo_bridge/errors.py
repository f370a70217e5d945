"""Exceptions of this package. Each message says what is wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

MOST_LINES, MOST_CHARACTERS = 60, 5000
"""Maximum length of a message: about one screen."""


def quote(value: object, most: int = 80, depth: int = 2) -> str:
    """Return an untrusted value for a message: on one line, escaped and truncated.

    Unlike ``repr``, this is fast for any value.

    Args:
        most: maximum number of characters of a text.
        depth: maximum number of nested lists.
    """
    match value:
        case None | bool() | float():
            return repr(value)
        case str() | bytes():
            return repr(value[:most]) + "..." * (len(value) > most)
        case int():
            bits = value.bit_length()
            return str(value) if bits <= 128 else f"an integer of {bits} bits"
        case list() | tuple() if depth:
            shown = [quote(item, most, depth - 1) for item in value[:8]]
            text = ", ".join(shown + ["..."] * (len(value) > 8))
            comma = "," * (len(value) == 1)
            return f"[{text}]" if isinstance(value, list) else f"({text}{comma})"
        case dict() if depth:
            items = islice(value.items(), 8)
            shown = [f"{quote(k, most, 0)}: {quote(v, most, depth - 1)}" for k, v in items]
            return f"{{{', '.join(shown + ['...'] * (len(value) > 8))}}}"
        case _:  # the name of a function or class; the class name of another object
            return f"<{getattr(value, '__name__', type(value).__name__)}>"


def escape(text: str, keep: str = "") -> str:
    r"""Replace unprintable characters by escapes such as ``\x1b``.

    Args:
        keep: control characters to leave as they are, for example ``"\n"``.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def fit_screen(text: str) -> str:
    """Return a message with control characters escaped and its length limited to a screen."""
    lines = text[:MOST_CHARACTERS].split("\n", MOST_LINES)
    shown = escape("\n".join(lines[:MOST_LINES]), keep="\n")
    cut = len(text) > MOST_CHARACTERS or len(lines) > MOST_LINES
    return f"{shown}\n(the rest of this message is left out)" if cut else shown


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for a message; empty if no known name is similar."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


class BridgeError(Exception):
    """Base of all errors that this package raises on purpose.

    The message fits one screen, even if it quotes a hostile file.
    """

    exit_code = 2
    """Exit code of the command line."""

    def __str__(self) -> str:
        return fit_screen(super().__str__())


class InputError(BridgeError):
    """The input is wrong: a path, an option, or options that contradict each other."""


class FormatError(BridgeError):
    """A file is damaged, or is not in the format that its name or place implies."""


class UnsupportedError(BridgeError):
    """The input is valid, but this package does not convert this kind of input."""


class UnsafePickleError(FormatError):
    """A pickle refers to a name that is not on the allow-list. None of it was executed."""


class MappingError(BridgeError):
    """Tensors do not match the mapping: missing, unexpected, of another shape, or overlapping."""


class OutputError(BridgeError):
    """The output can't be written: it exists, overlaps the source, or the disk is full."""


class MissingPackageError(BridgeError):
    """A package that only some commands need is not installed."""


class SkippedError(BridgeError):
    """Some of several iterations could not be read; the rest were converted."""


class ProcessError(BridgeError):
    """A started process ended with an error that is not a BridgeError."""


class TrainingStopped(BridgeError):  # noqa: N818
    """Training ended before its last step. What was saved is complete."""


class AskedToStop(TrainingStopped):
    """Stopped by SIGTERM or Ctrl-C after saving; the same command resumes at that step."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


EXTRAS = {
    "megatron": ("megatron", "transformers", "tokenizers", "numpy"),
    "train": ("omegaconf", "pyarrow", "matplotlib", "tensorboard"),
    "cloud": ("obstore",),
}
"""Packages that each extra installs, and that only some commands need."""


def install_hint(extra: str) -> str:
    """Return the command that installs an extra: from PyPI, and in a clone."""
    return f"pip install 'megatron-olmo-bridge[{extra}]' (in a clone: pip install -e '.[{extra}]')"


def missing_package(module: str) -> MissingPackageError | None:
    """Return an error that says how to install a module; None if no extra installs it."""
    package = module.partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return MissingPackageError(f"this needs {package}: {install_hint(extra)}")
    return None
