"""Everything that can go wrong, as exceptions. Each message says what, where, and what to do."""

import collections.abc
from difflib import get_close_matches


def nearest(name: str, known: collections.abc.Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for a message, or nothing where no known name is near."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


class BridgeError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 2
    """Of the command line."""


class InputError(BridgeError):
    """The input is not what it should be: wrong path, wrong option, a combination that can't be."""


class FormatError(BridgeError):
    """A file is damaged, or is not of the format that its place or name promises."""


class UnsupportedError(BridgeError):
    """The input is sound, but of a kind that this package does not convert."""


class UnsafePickleError(FormatError):
    """A pickle asks for a name that is not on the allow-list. Nothing of it was run."""


class MappingError(BridgeError):
    """Tensors and mapping disagree: missing, unexpected, misshapen, covered twice or not at all."""


class OutputError(BridgeError):
    """The output can't be written: it exists, overlaps the source, or the disk is too small."""


class MissingPackageError(BridgeError):
    """A package that only some commands need is not installed."""


class SkippedError(BridgeError):
    """Of several iterations some could not be read; the others were converted all the same."""


class ProcessError(BridgeError):
    """A process that was started died of an error that is not one of these."""


class TrainingStopped(BridgeError):  # noqa: N818
    """Training ended before its last step. What was saved is complete."""


class AskedToStop(TrainingStopped):
    """By SIGTERM or Ctrl-C; the step it stopped at is saved, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


EXTRAS = {
    "megatron": ("megatron", "transformers", "tokenizers", "numpy"),
    "train": ("omegaconf", "pyarrow", "matplotlib", "tensorboard"),
}
"""Extras, and packages that come with them and that only some commands need."""


def install_hint(extra: str) -> str:
    """Return the command that installs an extra: from an index, and in a clone."""
    return f"pip install 'megatron-olmo-bridge[{extra}]' (in a clone: pip install -e '.[{extra}]')"


def missing_package(module: str) -> MissingPackageError | None:
    """Return the error that a module is not installed; None if no extra brings it."""
    package = module.partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return MissingPackageError(f"this needs {package}: {install_hint(extra)}")
    return None
