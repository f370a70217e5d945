"""Read OLMo-core's token files: ids of one unsigned dtype, with an eos after each document.

They are named .npy but have no numpy header. Source: OLMo-core ``src/olmo_core/data/utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_olmo_bridge.errors import FormatError, InputError

from .documents import Span

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "uint64")
LONGEST_DOCUMENT = 2**31 - 1
"""In tokens: an indexed dataset has int32 lengths."""
_BLOCK = 1 << 20
_MIN_TOKENS_TO_JUDGE = 16
"""Tokens that a file needs so that its dtype can be recognised as too narrow."""
_NUMPY_MAGIC = b"\x93NUMPY"


def dtype_for(vocab_size: int) -> str:
    """Return OLMo-core's dtype of token files: the smallest that holds every id."""
    return np.min_scalar_type(vocab_size - 1).name


def token_spans(path: str, limit: int, dtype: str) -> list[Span]:
    """Return spans of at most ``limit`` bytes. A document belongs to the span where it begins.

    Raises:
        FormatError: the file has a numpy header, is cut within a token, or has a wider dtype.
    """
    width, size = np.dtype(dtype).itemsize, Path(path).stat().st_size
    with Path(path).open("rb") as file:
        if file.read(len(_NUMPY_MAGIC)) == _NUMPY_MAGIC:
            raise FormatError(
                f"{path}: has a numpy header, but OLMo-core's token files have none. Write it "
                f'without one: numpy.load(IN).astype("{dtype}").tofile(OUT)'
            )
    if size % width:
        raise FormatError(
            f"{path}: {size:,} bytes are not a whole number of {dtype} tokens: it is cut short, or "
            "has another dtype (--token-dtype)"
        )
    head = np.fromfile(path, dtype, _BLOCK)
    upper_halves = head[1::2]  # if the tokens are twice as wide
    if len(head) >= _MIN_TOKENS_TO_JUDGE and not upper_halves.any():
        raise FormatError(
            f"{path}: every second {dtype} token is 0, as in a file of uint{16 * width}. Name its "
            "dtype: --token-dtype"
        )
    cuts = [*range(0, size // width, max(limit // width, 1)), size // width]
    return [Span(path, a, b, (b - a) * width) for a, b in pairwise(cuts)]


def read_tokens(
    span: Span, dtype: str, eos_id: int, vocab_size: int
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], int, int]]:
    """Yield the documents that begin in a span, in blocks.

    A document without tokens, an eos right after another, is left out and counted. If the last
    document has no eos, it gets one.

    Yields:
        ids, which may end within a document; lengths of the documents that end among them; number
        of documents without tokens; bytes that were read.

    Raises:
        InputError: an id is beyond the vocabulary, or no eos was found.
    """
    tokens = np.memmap(span.path, dtype, mode="r")
    at, stop = (_document_from(tokens, i, span.path, eos_id) for i in (span.begin, span.end))
    unfinished = 0  # tokens of a document that an earlier block began
    while at < stop:
        block = tokens[at : min(at + _BLOCK, stop)]
        _check_ids(block, at, span.path, dtype, vocab_size)
        is_eos = block == eos_id
        after_eos = np.concatenate([[unfinished == 0], is_eos[:-1]])
        empty = is_eos & after_eos
        ends = np.flatnonzero(is_eos) + 1
        lengths = np.diff(np.concatenate([[-unfinished], ends]))
        unfinished = len(block) - int(ends[-1]) if len(ends) else unfinished + len(block)
        ids, lengths = block[~empty], lengths[lengths > 1]
        at += len(block)
        if at == stop and unfinished:
            ids = np.append(ids, np.asarray(eos_id, dtype))
            lengths = np.append(lengths, unfinished + 1)
        yield ids, lengths, int(empty.sum()), block.nbytes


def _document_from(tokens: NDArray[Any], begin: int, path: str, eos_id: int) -> int:
    """Return the position of the first document that begins at ``begin`` or later."""
    if begin == 0:
        return 0
    for at in range(begin - 1, len(tokens), _BLOCK):
        if at - begin > LONGEST_DOCUMENT:
            raise InputError(
                f"{path}: no eos (id {eos_id}) in {LONGEST_DOCUMENT:,} tokens: was it made with "
                "another tokenizer?"
            )
        ends = np.flatnonzero(tokens[at : at + _BLOCK] == eos_id)
        if len(ends):
            return at + int(ends[0]) + 1
    return len(tokens)


def _check_ids(block: NDArray[Any], at: int, path: str, dtype: str, vocab_size: int) -> None:
    if int(block.max()) >= vocab_size:
        wrong = int(np.argmax(block >= vocab_size))
        raise InputError(
            f"{path}: token {at + wrong:,} is {block[wrong]:,}, beyond the tokenizer's vocabulary "
            f"of {vocab_size:,}. Read as {dtype}: is that the dtype (--token-dtype), and the "
            "tokenizer that it was made with?"
        )
