"""Which tokens are in which step's batch: it follows from the seed, the step and the rank alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from megatron.core import ModelParallelConfig, parallel_state

from megatron_olmo_bridge.data.indexed import write_index
from megatron_olmo_bridge.errors import FormatError, InputError, OutputError
from megatron_olmo_bridge.runtime.process_groups import ensure_process_groups
from megatron_olmo_bridge.training.config import DataConfig, StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.token_data import MicroBatches, TokenData, check_data

LENGTH, BATCH, MICRO = 8, 4, 2
VOCABULARY = 1000


@pytest.fixture(autouse=True)
def groups(one_process: None) -> None:
    ensure_process_groups(ModelParallelConfig())


def write(prefix: Path, tokens: Any, dtype: str = "uint16") -> str:
    """A dataset of one document."""
    np.asarray(tokens, dtype).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), np.array([len(tokens)], "i4"), np.dtype(dtype))
    return str(prefix)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """97 tokens, which count: 12 sequences of 8 and the token after each."""
    return write(tmp_path / "text", range(97))


def run(*path: str, steps: int = 3, seed: int = 1, **data: Any) -> TrainingConfig:
    return TrainingConfig(
        train=StepsConfig(
            steps=steps,
            global_batch_size=BATCH,
            micro_batch_size=MICRO,
            sequence_length=LENGTH,
            seed=seed,
        ),
        data=DataConfig(path=list(path), **data),
    )


def steps_of(config: TrainingConfig, begin: int = 1) -> torch.Tensor:
    """Tokens of every step from one on: [steps, batch, length]."""
    data = TokenData.open(config, VOCABULARY)
    batches = MicroBatches(data.train, config.train, config.data.workers, begin)
    tokens = torch.cat([batch["tokens"] for batch in batches])
    return tokens.view(-1, BATCH, LENGTH)


def test_a_batch_is_tokens_and_what_comes_after_them(text: str) -> None:
    data = TokenData.open(run(text), VOCABULARY)
    for batch in MicroBatches(data.train, run(text).train, 0):
        assert batch["tokens"].shape == batch["labels"].shape == (MICRO, LENGTH)
        assert batch["tokens"].dtype == torch.int64
        assert torch.equal(batch["labels"], batch["tokens"] + 1)
        assert torch.equal(batch["position_ids"][0], torch.arange(LENGTH))


def test_an_epoch_has_each_sequence_once(text: str) -> None:
    found = steps_of(run(text))
    assert found.shape == (3, BATCH, LENGTH)
    assert sorted(found.flatten().tolist()) == list(range(96))


def test_the_order_follows_from_the_seed(text: str) -> None:
    first = steps_of(run(text, seed=1))
    assert torch.equal(first, steps_of(run(text, seed=1)))
    assert not torch.equal(first, steps_of(run(text, seed=2)))
    assert first.flatten().tolist() != sorted(first.flatten().tolist())


def test_a_resumed_run_has_the_batches_that_would_have_come(text: str) -> None:
    whole = steps_of(run(text, steps=7))
    for begin in (1, 2, 7):
        assert torch.equal(steps_of(run(text, steps=7), begin), whole[begin - 1 :])
    assert not list(MicroBatches(TokenData.open(run(text), 1000).train, run(text).train, 0, 4))


def test_data_may_be_read_ahead(text: str) -> None:
    assert torch.equal(steps_of(run(text, workers=1)), steps_of(run(text)))


def test_more_steps_than_data_begin_again(text: str) -> None:
    """In 80 sequences each of the 12 occurs six or seven times, plus or minus one at the seams."""
    found = steps_of(run(text, steps=20))[:20]
    seen = found.flatten().bincount(minlength=97)
    assert seen.sum() == 20 * BATCH * LENGTH
    assert seen.min() >= 5 and seen.max() <= 8


@pytest.mark.parametrize("ranks", [2, 1])
def test_data_parallel_ranks_share_out_each_step(
    text: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their micro-batches, in turn, are those of a single process, whose order they keep."""
    whole = steps_of(run(text))
    data = TokenData.open(run(text), VOCABULARY)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        shares.append([b["tokens"] for b in MicroBatches(data.train, run(text).train, 0)])
    together = [share for turn in zip(*shares, strict=True) for share in turn]
    assert torch.equal(torch.cat(together).view(-1, BATCH, LENGTH), whole)


# ---------------------------------------------------------------------------------------- blends


def share_of_the_first(config: TrainingConfig) -> float:
    """Return the share of sequences of the first dataset; tokens of the second start at 500."""
    return float((steps_of(config)[..., 0] < 500).double().mean())


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """300 and 100 tokens."""
    return [write(tmp_path / "a", range(300)), write(tmp_path / "b", range(500, 600))]


@pytest.mark.parametrize(("weights", "share"), [(None, 0.75), ([1.0, 1.0], 0.5), ([1.0, 9.0], 0.1)])
def test_a_blend(two: list[str], weights: list[float] | None, share: float) -> None:
    config = run(*two, steps=25, weights=weights)
    assert share_of_the_first(config) == pytest.approx(share, abs=0.02)


def test_no_sequence_is_of_two_datasets(two: list[str]) -> None:
    found = steps_of(run(*two, steps=25)) >= 500
    assert torch.equal(found.any(-1), found.all(-1))


def test_validation_is_the_same_each_time_and_apart(text: str, two: list[str]) -> None:
    config = run(text, validation=[two[1]])
    config.evaluation.batches = 2
    data = TokenData.open(config, VOCABULARY)
    first, second = (
        torch.cat([batch["tokens"] for batch in MicroBatches(data.validation, config.train, 0)])
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.min() >= 500
    assert len(first) >= 2 * BATCH
    assert torch.equal(steps_of(config), steps_of(run(text)))


def test_a_file_of_a_dataset_names_it(text: str) -> None:
    assert torch.equal(steps_of(run(f"{text}.bin")), steps_of(run(text)))


def test_the_index_of_samples_is_kept_where_it_is_asked_for(text: str, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    cached = run(text, cache=str(tmp_path / "cache"))
    assert torch.equal(steps_of(cached), steps_of(cached))
    assert {path.name for path in tmp_path.iterdir()} - before == {"cache"}


# ---------------------------------------------------------------------------------------- errors


def configured(data: DataConfig) -> TrainingConfig:
    return TrainingConfig(train=StepsConfig(sequence_length=LENGTH), data=data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": []}, r"no data: give data\.path=PREFIX"),
        ({"path": ["none"]}, r"none\.idx: no such file"),
        ({"weights": [1.0, 2.0]}, "2 values for 1 paths"),
        ({"weights": [0.0]}, "must be more than 0"),
        ({"weights": [float("nan")]}, "must be more than 0"),
        ({"validation": ["none"]}, r"none\.idx: no such file"),
    ],
)
def test_what_can_not_be(text: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_data(configured(DataConfig(**{"path": [text], **data})), VOCABULARY)


@pytest.mark.parametrize(("tokens", "enough"), [(8, False), (9, True)])
def test_a_sequence_takes_the_token_after_it_too(tmp_path: Path, tokens: int, enough: bool) -> None:
    config = run(write(tmp_path / "short", range(tokens)), steps=1)
    if enough:
        assert steps_of(config).shape == (1, BATCH, LENGTH)
    else:
        with pytest.raises(InputError, match=r"short: has 8 tokens, .*sequence_length=8"):
            TokenData.open(config, VOCABULARY)


def test_tokens_that_the_model_does_not_have(text: str) -> None:
    record = '{"documents": 1, "tokens": 97, "dtype": "uint16", "%s": %d}'
    Path(f"{text}.json").write_text(record % ("vocab_size", 1001))
    with pytest.raises(InputError, match=r"tokenizer of 1001 tokens.*has 1000.*model\.vocab_size"):
        check_data(configured(DataConfig(path=[text])), VOCABULARY)
    Path(f"{text}.json").write_text(record % ("max_token_id", 1000))
    with pytest.raises(InputError, match="has token 1000, the model has 1000"):
        check_data(configured(DataConfig(path=[text])), VOCABULARY)


def test_damaged_data(text: str) -> None:
    Path(f"{text}.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="cut short"):
        check_data(configured(DataConfig(path=[text])), VOCABULARY)


def test_an_index_that_can_not_be_written(text: str) -> None:
    with pytest.raises(OutputError, match=r"index of samples.*data\.cache=DIR"):
        TokenData.open(run(text, cache=f"{text}.bin/x"), VOCABULARY)
