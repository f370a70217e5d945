"""Describe an indexed dataset, from the record of ``prepare-data`` and from its index."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np

from megatron_olmo_bridge.errors import FormatError, InputError, quote
from megatron_olmo_bridge.formats.files import ARTIFACT_FILES_LIMIT, read_json, read_small

from .indexed import Indexed, read_indexed
from .prefix import prefix_of

_FIRST_TOKENS = 32


@dataclass(frozen=True)
class DataInfo:
    """A dataset; what only ``prepare-data`` records is None for datasets of other programs."""

    prefix: str
    documents: int
    tokens: int
    """Including the eos of each document."""
    dtype: str
    tokenizer: str | None = None
    """The folder or hub id that it was prepared with."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the tokenizer's tokenizer.json."""
    vocab_size: int | None = None
    """Largest id of the tokenizer plus 1."""
    eos_id: int | None = None
    max_token_id: int | None = None
    """Largest id in the dataset."""
    empty_documents: int = 0
    """Documents without a token, which were left out."""
    bad_lines: int = 0
    """Lines that were left out because they could not be read."""
    first_bad_lines: list[str] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """``path`` and ``bytes`` of each input file."""
    plan: str | None = None
    """SHA-256 of the inputs' names and sizes, the tokenizer, the options and the version."""
    input_state: str | None = None
    """SHA-256 of the inputs' sizes, times and inodes, which shows whether they were changed."""
    version: str | None = None
    """Version of this package."""


@dataclass(frozen=True)
class Description:
    """Statistics and first tokens of a dataset."""

    info: DataInfo
    nbytes: int
    """Bytes of its files."""
    mean: float
    """Tokens of a document, on average."""
    median: float
    """Tokens of a document."""
    longest: int
    """Tokens of the longest document."""
    first_tokens: list[int]
    first_text: str | None
    """The first tokens decoded, if the tokenizer's folder exists here."""


def read_info(path: str | Path) -> DataInfo:
    """Read a dataset's record, or its index if there is no record.

    Args:
        path: prefix of the dataset, or one of its files.

    Raises:
        InputError: a file is missing.
        FormatError: damaged, cut short, or files that don't belong together.
    """
    return _info(_read(path))


def describe(path: str | Path) -> Description:
    """Return statistics and the first tokens of a dataset.

    Arguments and errors are those of :func:`read_info`.
    """
    data = _read(path)
    info = _info(data)
    lengths = data.document_lengths()
    first = data.first_tokens(_FIRST_TOKENS).tolist()
    files = (Path(data.prefix + suffix) for suffix in (".bin", ".idx", ".json"))
    return Description(
        info=info,
        nbytes=sum(f.stat().st_size for f in files if f.is_file()),
        mean=float(lengths.mean()) if len(lengths) else 0.0,
        median=float(np.median(lengths)) if len(lengths) else 0.0,
        longest=int(lengths.max(initial=0)),
        first_tokens=first,
        first_text=_decoded(info, first),
    )


def _read(path: str | Path) -> Indexed:
    prefix = prefix_of(path)
    if Path(f"{prefix}.partial").is_dir() and not Path(f"{prefix}.idx").exists():
        raise InputError(
            f"{prefix}.partial: an interrupted prepare-data. Run the same command again with "
            "--resume, or delete the folder."
        )
    return read_indexed(prefix)


def _info(data: Indexed) -> DataInfo:
    found = {"documents": data.documents, "tokens": data.tokens, "dtype": data.dtype.name}
    path = Path(f"{data.prefix}.json")
    try:
        info = DataInfo(prefix=data.prefix, **read_json(path))
        _check_types(info)
    except FileNotFoundError:
        return DataInfo(prefix=data.prefix, **found)  # type: ignore[arg-type]
    except (FormatError, TypeError) as error:
        raise FormatError(
            f"{path}: not the record of prepare-data ({error}). Move it away to use the dataset "
            "without one."
        ) from error
    if differing := [k for k, v in found.items() if asdict(info)[k] != v]:
        raise FormatError(f"{path}: does not match the .bin and .idx next to it in {differing[0]}")
    return info


def _check_types(info: DataInfo) -> None:
    """Raise TypeError if a field's value is not of its type."""
    for name, hint in get_type_hints(DataInfo).items():
        if not isinstance(getattr(info, name), list if get_origin(hint) is list else hint):
            raise TypeError(f"{name} is {quote(getattr(info, name))}")
    if not all(isinstance(e, dict) and type(e.get("bytes")) is int for e in info.inputs):
        raise TypeError("inputs lack their sizes")


def _decoded(info: DataInfo, ids: list[int]) -> str | None:
    file = Path(info.tokenizer or "") / "tokenizer.json"
    if info.tokenizer is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(read_small(file, ARTIFACT_FILES_LIMIT))
        return str(tokenizer.decode(ids, skip_special_tokens=False))
    except Exception:  # the library has no class of its own; the text is an extra
        return None
