"""Open a checkpoint of any kind. A new kind is a file here, with its class in ``KINDS``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import AnyPath, RemotePath
from megatron_olmo_bridge.storage.identity import Snapshot
from megatron_olmo_bridge.storage.remote import open_remote, scheme_of
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER

from .checkpoint import Checkpoint, KindOption, ReadOptions, artifact_patterns
from .hf import HFCheckpoint
from .megatron import MegatronCheckpoint
from .olm import OLMCheckpoint
from .olmo_core import OLMoCoreCheckpoint
from .olmo_trainer import OLMoTrainerCheckpoint

KINDS: tuple[type[Checkpoint], ...] = (
    OLMCheckpoint,
    OLMoCoreCheckpoint,
    OLMoTrainerCheckpoint,
    MegatronCheckpoint,
    HFCheckpoint,
)
"""Kinds in the order in which they are tried. Hugging Face is last, since its error says what a
folder lacks."""


def open_checkpoint(
    path: str | AnyPath,
    options: ReadOptions | None = None,
    *,
    strict: bool = True,
    finished: bool = True,
) -> Checkpoint:
    """Open a checkpoint and check it against the mapping of its model, from headers alone.

    Args:
        path: a Hugging Face folder, a Megatron checkpoint root or an iteration's folder, or a
            ``.pt`` file of OLM's trainer; or the address of one.
        options: facts that the checkpoint may not record.
        strict: refuse a Hugging Face folder whose tensors are not those of its config.
        finished: refuse the output of a conversion that has not ended.

    Raises:
        InputError: the path is not a checkpoint, or is incomplete.
        FormatError: a file is damaged.
        UnsupportedError: the checkpoint is of a variant that is not converted.
        MappingError: the tensors are not those of the config's model.
    """
    options = options or ReadOptions()
    if isinstance(path, str) and scheme_of(path):
        path = open_remote(path, options.max_connections)
    elif not isinstance(path, RemotePath):
        path = Path(path).expanduser()
    try:
        kind, weights = find_kind(path, options.iteration, finished)
        _check_options(kind, path, options)
        folders = kind.file_patterns(weights)
        if options.hf_config:
            folders |= artifact_patterns(Path(options.hf_config))
        snapshot = Snapshot.of(folders)
        return replace(kind.open(weights, options, strict), snapshot=snapshot)
    except PermissionError as error:
        raise InputError(f"{error.filename}: no permission to read it") from error
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error


def find_kind(
    path: AnyPath, iteration: int | str | None = None, finished: bool = True
) -> tuple[type[Checkpoint], AnyPath]:
    """Return the kind of a checkpoint, and the folder or file with its weights.

    For arguments see :func:`open_checkpoint`.

    Raises:
        InputError: the path does not exist, or is not a checkpoint but, for example, an
            interrupted conversion.
        UnsupportedError: the checkpoint is of a variant that is not converted.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    for folder in (path, path.resolve().parent):
        if finished and (folder / PARTIAL_MARKER).is_file():
            raise InputError(
                f"{folder}: an interrupted conversion, not a checkpoint. Run the same command "
                "again with --resume, or delete the folder."
            )
    for kind in KINDS:
        if weights := kind.find(path, iteration):
            return kind, weights
    kinds = " nor ".join(f"{kind.kind} ({kind.looks_like})" for kind in reversed(KINDS))
    message = f"not a checkpoint: neither {kinds}"
    if path.is_file():
        message = f"is a file, {message}. Is its folder a checkpoint? Then name that"
    raise InputError(f"{path}: {message}")


def kind_options() -> tuple[KindOption, ...]:
    """Return the options that only one kind of checkpoint has, for the command line."""
    return tuple(option for kind in KINDS for option in kind.own_options)


def options_for_each(paths: Sequence[AnyPath], options: ReadOptions) -> list[ReadOptions]:
    """Return the options for each path, without those that only other kinds have.

    Raises:
        InputError: no path has a use for an option; or see :func:`find_kind`.
    """
    kinds = [find_kind(path, options.iteration)[0] for path in paths]
    names = _values(options)
    for name in names:
        if not any(kind.accepts(name) for kind in kinds):
            _check_options(kinds[0], paths[0], options)
    others = names.keys() - options.kind_options.keys()
    each_options = []
    for kind in kinds:
        own = {n: value for n, value in options.kind_options.items() if kind.accepts(n)}
        without: dict[str, Any] = {n: None for n in others if not kind.accepts(n)}
        each_options.append(replace(options, kind_options=own, **without))
    return each_options


def _values(options: ReadOptions) -> dict[str, Any]:
    """Return the options that are set, those of one kind alone among them."""
    values = {f.name: getattr(options, f.name) for f in fields(ReadOptions)}
    del values["max_connections"]
    values |= values.pop("kind_options")
    return {name: value for name, value in values.items() if value is not None}


def _check_options(kind: type[Checkpoint], path: AnyPath, options: ReadOptions) -> None:
    """Raise InputError for an option that the kind has no use for."""
    for name in _values(options):
        if not kind.accepts(name):
            flag = f"--{name.replace('_', '-')}"
            kinds = [k.kind for k in reversed(KINDS) if k.accepts(name)]
            if not kinds:
                raise InputError(f"kind_options: no kind of checkpoint has an option {name!r}")
            raise InputError(
                f"{path}: {flag} is for {' and '.join(kinds)} checkpoints; this is {kind.kind}"
            )
