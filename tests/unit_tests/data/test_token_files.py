"""OLMo-core's token files: cut anywhere, their documents are the same."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_olmo_bridge.data import token_files
from megatron_olmo_bridge.data.token_files import dtype_for, read_tokens, token_spans
from megatron_olmo_bridge.errors import FormatError, InputError

EOS, VOCAB = 3, 100


def documents(path: Path, dtype: str, limit: int) -> tuple[list[list[int]], int]:
    """Documents of a file divided into spans of ``limit`` bytes, and the number of empty ones."""
    ids: list[int] = []
    lengths: list[int] = []
    left_out = nbytes = 0
    for span in token_spans(str(path), limit, dtype):
        for some, ends, empty, read in read_tokens(span, dtype, EOS, VOCAB):
            assert some.dtype == dtype
            ids += some.tolist()
            lengths += ends.tolist()
            left_out += empty
            nbytes += read
    assert nbytes == path.stat().st_size
    assert sum(lengths) == len(ids)
    at = np.cumsum([0, *lengths])
    return [ids[a:b] for a, b in pairwise(at)], left_out


@pytest.mark.parametrize("dtype", token_files.TOKEN_DTYPES)
@pytest.mark.parametrize("limit", [8, 40, 1 << 20])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_end_at_eos(
    tmp_path: Path, dtype: str, limit: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_BLOCK", block)
    rng = np.random.default_rng(0)
    lists = [rng.integers(4, VOCAB, n).tolist() for n in [5, 0, 1, 30, 0, 0, 2, 1, 9]]
    path = tmp_path / "tokens.npy"
    np.array([t for ids in lists for t in [*ids, EOS]][:-1], dtype).tofile(path)
    found, empty = documents(path, dtype, limit)
    assert found == [[*ids, EOS] for ids in lists if ids]
    assert empty == 3


def test_what_is_no_token_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(10))
    with pytest.raises(FormatError, match=r"has a numpy header.*tofile"):
        token_spans(str(path), 100, "uint32")
    np.arange(1, 20, dtype="uint32").tofile(path)
    with pytest.raises(
        FormatError, match=r"every second uint16 token is 0.* uint32.*--token-dtype"
    ):
        token_spans(str(path), 100, "uint16")
    path.write_bytes(bytes(10))
    with pytest.raises(FormatError, match="10 bytes are not a whole number of uint32 tokens"):
        token_spans(str(path), 100, "uint32")


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.array([5, 6, EOS, 7, 100, EOS], "uint16").tofile(path)
    with pytest.raises(InputError, match=r"token 4 is 100, beyond .* vocabulary of 100.*uint16"):
        documents(path, "uint16", 4)


def test_a_file_of_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_BLOCK", 4)
    monkeypatch.setattr(token_files, "LONGEST_DOCUMENT", 50)
    path = tmp_path / "tokens.npy"
    np.full(100, 5, "uint16").tofile(path)
    with pytest.raises(InputError, match=r"no eos .id 3. in 50 tokens.*another tokenizer"):
        documents(path, "uint16", 40)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (100278, "uint32")],
)
def test_the_dtype_is_olmo_cores(vocab_size: int, dtype: str) -> None:
    assert dtype_for(vocab_size) == dtype
