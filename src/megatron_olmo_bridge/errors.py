"""Everything that can go wrong, as exceptions. Each message says what, where, and what to do."""


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


class ProcessError(BridgeError):
    """A process that was started died of an error that is not one of these."""


class TrainingStopped(BridgeError):  # noqa: N818
    """Training ended before its last step. What was saved is complete."""


class AskedToStop(TrainingStopped):
    """By SIGTERM or Ctrl-C; the step it stopped at is saved, and the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
