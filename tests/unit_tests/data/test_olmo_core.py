"""Raw token files in OLMo-core's order. OLMo-core's own batches are in test_olmo_core.py of the
functional tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_olmo_bridge.data.olmo_core import (
    ShuffledBatches,
    TokenFiles,
    is_repetitive,
    read_mix,
)
from megatron_olmo_bridge.errors import FormatError, InputError


def test_a_mix_lists_paths_with_or_without_labels(tmp_path: Path) -> None:
    for name in ("a.npy", "dolma2/b.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    mix = tmp_path / "mix.txt"
    mix.write_text("# a comment\n\nweb,{TOKENIZER}/b.npy\na.npy\n")
    assert read_mix(mix, tmp_path, "dolma2") == [tmp_path / "dolma2/b.npy", tmp_path / "a.npy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "names no files"),
        ("web,none.npy\n", "line 1: no file .*none.npy"),
        ("\nweb,s3://bucket/a.npy\n", "line 2 names a URL, s3://bucket/a.npy: fetch it first"),
        ("web,{TOKENIZER}/a.npy\n", "line 1 needs the name of the tokenizer"),
    ],
)
def test_a_bad_mix_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_mix(tmp_path / "mix.txt", tmp_path)


def test_the_first_trainer_has_the_order_of_the_seed_before() -> None:
    """``IterableDataset`` of ai2-olmo 0.6.0 adds the epoch, counted from 0, to its seed."""
    count, seed = 11, 6198
    batches = ShuffledBatches(count=count, batch_size=4, seed=seed - 1)
    for epoch in range(2):
        order = np.arange(count, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
        found = [batches.batch(2 * epoch + i) for i in range(2)]
        assert np.concatenate(found).tolist() == order[:8].tolist()


def test_a_mix_is_text(tmp_path: Path) -> None:
    (tmp_path / "mix.npy").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"mix\.npy: is not a list of paths: not UTF-8 text"):
        read_mix(tmp_path / "mix.npy", tmp_path)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_vocabulary_decides_the_dtype(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert TokenFiles([], 4, vocab_size).dtype.__name__ == dtype


def test_sequences_do_not_cross_files_and_the_rest_is_left_out(tmp_path: Path) -> None:
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.arange(11, dtype=np.uint16).tofile(files[0])
    np.arange(100, 109, dtype=np.uint16).tofile(files[1])
    tokens = TokenFiles(files, 4, 1000)
    assert len(tokens) == 4
    assert [tokens[i].tolist() for i in range(4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [100, 101, 102, 103], [104, 105, 106, 107],
    ]  # fmt: skip
    assert tokens[0].dtype == np.int64


def test_a_file_that_ends_within_a_token_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"\0" * 5)
    with pytest.raises(FormatError, match="5 bytes, which is not a whole number of uint16"):
        len(TokenFiles([tmp_path / "a.npy"], 2, 1000))


def test_each_epoch_is_shuffled_by_seed_and_epoch_and_its_last_batch_dropped() -> None:
    batches = ShuffledBatches(count=11, batch_size=4, seed=5)
    assert batches.batches_per_epoch == 2
    for epoch in (1, 2, 1):
        order = np.arange(11, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(5 + epoch)).shuffle(order)
        got = [batches.batch(2 * (epoch - 1) + i).tolist() for i in range(2)]
        assert got == [order[:4].tolist(), order[4:8].tolist()]


def test_less_than_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="the data has 3 sequences, fewer than a batch of 4"):
        ShuffledBatches(count=3, batch_size=4, seed=5)


@pytest.mark.parametrize("period", [1, 2, 13])
def test_repetitions_count_wherever_they_begin(period: int) -> None:
    random = np.random.default_rng(period)
    tokens = random.permutation(1000)
    pattern = 1000 + np.arange(period)
    for repeats, expected in ((31, False), (32, True)):
        part = np.concatenate([tokens[:7], np.tile(pattern, repeats), tokens[7:500]])
        assert is_repetitive(part) is expected


def test_a_longer_period_is_not_a_repetition() -> None:
    assert not is_repetitive(np.tile(np.arange(14), 40))
