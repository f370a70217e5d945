"""Read small files whole, up to a limit, and only if they are regular files.

The files may come from strangers. So a pipe or a device is never waited for, nothing larger than
its limit is read, and JSON and YAML become plain values of bounded depth and number.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from typing import Any, BinaryIO, TypeGuard

from megatron_olmo_bridge.errors import FormatError, InputError, quote

from .remote_path import AnyPath, RemotePath

# Most bytes of each kind of file that is read whole. Real ones are far smaller.
TRACKER_LIMIT = 1 << 10
YAML_LIMIT = 1 << 20
"""run_config.yaml and run.yaml."""
RECIPE_LIMIT = 1 << 20
JSON_LIMIT = 24 << 20
"""config.json, the index of shards, headers of safetensors files (200,000 tensors), and the records
that this package writes."""
MIX_LIMIT = 64 << 20
"""A list of token files; OLMo's have up to 40,000 lines."""
ARTIFACT_FILES_LIMIT = 64 << 20
"""Config and tokenizer files of a folder, together."""
LEAVES_LIMIT = 64 << 20
"""Hashes of the blocks of a fingerprint: those of 3.9 TB."""
PICKLE_LIMIT = 256 << 20
""".metadata, and the pickle in an archive: 5 MB for a 32B model with its optimizer's state. Reading
takes some 20 times as much memory, and never more than 32 times."""

MAX_DEPTH = 64
"""Lists and maps inside each other, in JSON and YAML."""
MAX_VALUES = 2_000_000
"""Values in a JSON file; one takes up to 100 bytes of memory, however short it is."""
MAX_DIGITS = 1000
"""Digits of a number."""
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_CONTAINERS = (dict, list)

_POINTER = b"version https://git-lfs.github.com/spec/"
"""https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: the first key of a Git LFS pointer,
which a clone has in the place of a large file that was not downloaded."""
_LARGEST_POINTER = 1 << 10
"""Bytes, by the same specification."""
_MAX_NAME_BYTES = 255
"""Length of a file's name, on Linux's file systems."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_name(path: AnyPath) -> None:
    """Raise FormatError if a path is not UTF-8, as the formats and their libraries require.

    Output paths are checked too; otherwise what is written could not be read again.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{path}: its name, or a folder's above it, is not UTF-8. Rename it."
        ) from error


def open_regular(file: AnyPath) -> BinaryIO:
    """Open a regular file for reading; the caller closes it.

    Raises:
        FormatError: it is something else (a folder, pipe, socket or device), a Git LFS pointer, or
            its path is not UTF-8.
        InputError: it can't be opened.
        FileNotFoundError, PermissionError: as :func:`open`.
    """
    check_name(file)
    if isinstance(file, RemotePath):
        return file.open()
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise FormatError(f"{file}: is a socket, not a regular file") from error
        raise InputError(f"{file}: can't be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise FormatError(f"{file}: is {kind}, not a regular file")
        if status.st_size <= _LARGEST_POINTER and os.pread(fd, len(_POINTER), 0) == _POINTER:
            raise FormatError(
                f"{file}: a Git LFS pointer, not the file itself, which was not downloaded. Run "
                "`git lfs pull` in the clone, or download the model with `hf download`."
            )
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file, which is then at its beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def refuse_pointer(file: AnyPath) -> None:
    """Raise FormatError if the file is a Git LFS pointer."""
    if file.stat().st_size <= _LARGEST_POINTER:
        open_regular(file).close()


def read_small(file: AnyPath, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        FormatError: it is larger, and was not read; or see :func:`open_regular`.
        InputError, FileNotFoundError, PermissionError: see :func:`open_regular`.
    """
    with open_regular(file) as handle:
        size = size_of(handle)
        if size > limit:
            raise FormatError(
                f"{file}: has {size:,} bytes; a file of this kind is read up to {limit:,}"
            )
        data = handle.read(size + 1)
    if len(data) != size:
        raise FormatError(f"{file}: changed while it was read")
    return data


def read_json(file: AnyPath, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Return the JSON object in a file of at most ``limit`` bytes.

    Raises:
        FormatError: it is not sound JSON, or not an object; or see :func:`read_small`.
        InputError, FileNotFoundError, PermissionError: see :func:`open_regular`.
    """
    value = parse_json(read_small(file, limit), file)
    if not isinstance(value, dict):
        raise FormatError(f"{file}: does not hold a JSON object")
    return value


def parse_json(data: bytes, where: object) -> Any:
    """Return the value of a JSON text in UTF-8, with NaN and Infinity as Python writes them.

    Args:
        data: the text.
        where: the file, for messages.

    Raises:
        FormatError: the text is not sound, exceeds a limit above, has a key twice in an object, or
            has half a surrogate pair in a string, which no file can hold.
    """
    try:
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        if _LONG_NUMBER.search(data):
            raise ValueError(f"a number of more than {MAX_DIGITS:,} digits")
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_unique)
        check_plain(value, text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not sound JSON: {error}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{quote(name)} stands in it twice")
    return members


def is_file_name(name: object) -> TypeGuard[str]:
    """Return whether a folder can have a file of this name in it."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "/" not in name
        and name.isprintable()
        and len(name.encode()) <= _MAX_NAME_BYTES
    )


def check_plain(value: Any, text: str) -> None:
    """Raise ValueError for lists and maps nested too deep, or strings that no file can hold.

    Args:
        value: the value.
        text: the text that it was read from.
    """
    level = [value] if type(value) in _CONTAINERS else []
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"lists and objects are more than {MAX_DEPTH} deep")
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _CONTAINERS
        ]
    if "\\" in text:  # half a surrogate pair can only be written as an escape
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(r"a string has half a surrogate pair (\ud800, for example)") from error
