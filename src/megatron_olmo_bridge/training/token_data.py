"""Batches of tokens for pretraining, divided by step and process.

The sequences are those of megatron-core's GPTDataset, or those of OLMo's token files in the order
of OLMo-core.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from megatron_olmo_bridge.data.info import DataInfo, read_info
from megatron_olmo_bridge.data.olmo_core import (
    ShuffledBatches,
    TokenFiles,
    is_repetitive,
    read_mix,
)
from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.runtime.signals import sheltered

from .config import DataConfig, StepsConfig, TrainingConfig

Batch = dict[str, torch.Tensor]
IGNORED = -100
"""Label of a position that is not learned from, as in torch and transformers."""


class _NoTokenizer:
    """Stand-in for the tokenizer that GPTDataset requires, for tokens that are prepared already."""

    pad, eod = -1, -2  # ids that no token has: GPTDataset then masks nothing
    vocab_size = None  # GPTDataset then takes the dtype from the files
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


@dataclass
class TokenData:
    """Sequences of a run, by number: number i is the same in every process and after a resume."""

    train: Any
    """Dataset of sequences, each with tokens and labels [sequence_length], int64."""
    validation: Any | None
    info: list[DataInfo]
    """Facts about the prepared files of each path, those of ``data.validation`` last."""

    @classmethod
    def open(cls, config: TrainingConfig, vocab_size: int) -> TokenData:
        """Open the files, and index their sequences if needed; all processes call it.

        Raises:
            InputError: no data, too little of it, or tokens outside the model's vocabulary.
            FormatError: damaged data.
            OutputError: the index of the sequences can't be written.
        """
        data, train = config.data, config.train
        info = check_data(config, vocab_size)
        batch = train.global_batch_size
        sizes = [
            train.steps * batch if data.path else 0,
            config.evaluation.batches * batch if data.validation else 0,
        ]
        # Without weights megatron-core would end a blend after one epoch.
        tokens = [float(i.tokens) for i in info]
        prefixes, count = [i.prefix for i in info], len(data.path)
        blends: list[Any] = [
            (prefixes[:count], data.weights or tokens[:count]) if data.path else None
        ]
        blends.append((prefixes[count:], tokens[count:]) if data.validation else None)
        index = GPTDatasetConfig(
            random_seed=train.seed,
            sequence_length=train.sequence_length,
            blend_per_split=[*blends, None],
            path_to_cache=data.cache,
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        with _translate_data_errors(data):
            builder = BlendedMegatronDatasetBuilder(GPTDataset, [*sizes, 0], lambda: True, index)
            built = builder.build() if data.path or data.validation else [None, None]
        sequences = MixSequences.open(config, vocab_size) if data.mix else built[Split.train.value]
        return cls(sequences, built[Split.valid.value], info)


@dataclass
class MixSequences:
    """Sequences of ``data.mix``, by their number in the run."""

    files: TokenFiles
    order: ShuffledBatches
    steps: int
    skip_repetitive: bool
    fingerprint: str
    """OLMo-core's fingerprint of the data set."""

    @classmethod
    def open(cls, config: TrainingConfig, vocab_size: int) -> MixSequences:
        """Find the files and their sizes.

        Raises:
            InputError: a file is absent, or there is less than a batch.
            FormatError: a file is damaged.
        """
        data, train = config.data, config.train
        mix = Path(data.mix or "").expanduser()
        files = read_mix(mix, Path(data.root).expanduser() if data.root else mix.parent)
        tokens = TokenFiles(files, train.sequence_length, data.vocab_size or vocab_size)
        seed = train.seed if data.seed is None else data.seed
        order = ShuffledBatches(len(tokens), train.global_batch_size, seed)
        ids = (config.model.get(f"{name}_token_id") for name in ("pad", "eos", "bos"))
        fingerprint = tokens.fingerprint(*ids)
        if data.fingerprint not in (None, fingerprint):
            raise InputError(
                f"{mix}: is not the data set of the run: names, sizes or order of its files differ "
                f"(fingerprint {fingerprint}, not {data.fingerprint})"
            )
        return cls(tokens, order, train.steps, data.skip_repetitive, fingerprint)

    def __len__(self) -> int:
        return self.steps * self.order.batch_size

    def __getitem__(self, number: int) -> Batch:
        """Return tokens and labels [sequence_length], int64; the last label is ignored."""
        batch, index = divmod(number, self.order.batch_size)
        tokens = self.files[int(self.order.batch(batch)[index])]
        labels = np.append(tokens[1:], IGNORED)
        if self.skip_repetitive and is_repetitive(tokens):
            labels[:] = IGNORED
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.arange(len(tokens)),
        }

    def trainer_state(self, step: int) -> dict[str, Any]:
        """Return the state of OLMo-core's trainer and data loader after a step."""
        epoch, batches = divmod(step - 1, self.order.batches_per_epoch)
        length = self.files.sequence_length
        tokens = self.order.batch_size * length
        return {
            "global_train_tokens_seen": step * tokens,
            "max_steps": self.steps,
            "epoch": epoch + 1,
            "data_loader": {
                "dataset_fingerprint_version": "v2.0",
                "dataset_fingerprint": self.fingerprint,
                "batches_processed": batches + 1,
                "tokens_processed": (batches + 1) * tokens,
                "seed": self.order.seed,
                "epoch": epoch + 1,
                "dataset_type": "fsl",
                "sequence_length": length,
                "max_target_sequence_length": None,
            },
        }


def check_data(config: TrainingConfig, vocab_size: int) -> list[DataInfo]:
    """Check the files of ``data``, and return the facts about those that were prepared.

    Raises:
        InputError: no path is set, a file is missing or too small, weights don't fit, or tokens are
            outside the model's vocabulary.
        FormatError: a file is damaged.
    """
    data, sequence_length = config.data, config.train.sequence_length
    if data.mix:
        if data.path or data.weights:
            raise InputError("data.mix and data.path are both set: leave out one of them")
        MixSequences.open(config, vocab_size)
    elif not data.path:
        raise InputError(
            "no data: give data.path=PREFIX, the output of `olmo-bridge prepare-data` "
            "(PREFIX.bin and PREFIX.idx)"
        )
    if data.weights is not None and len(data.weights) != len(data.path):
        raise InputError(
            f"data.weights has {len(data.weights)} values for {len(data.path)} paths in data.path"
        )
    if not all(0 < weight < math.inf for weight in data.weights or []):
        raise InputError(
            f"data.weights={data.weights}: each must be more than 0; leave out paths without one"
        )
    infos = [read_info(Path(prefix)) for prefix in [*data.path, *data.validation]]
    for info in infos:
        if info.tokens <= sequence_length:
            raise InputError(
                f"{info.prefix}: has {info.tokens:,} tokens, too few for one sequence of "
                f"train.sequence_length={sequence_length} and the token after it"
            )
        if info.vocab_size is not None and info.vocab_size > vocab_size:
            raise InputError(
                f"{info.prefix}: was prepared with a tokenizer of {info.vocab_size} tokens "
                f"({info.tokenizer}), the model has {vocab_size}. Prepare it with the model's "
                "tokenizer, or set model.vocab_size."
            )
        if info.max_token_id is not None and info.max_token_id >= vocab_size:
            raise InputError(
                f"{info.prefix}: has token {info.max_token_id}, the model has {vocab_size} tokens"
            )
    return infos


@contextlib.contextmanager
def _translate_data_errors(data: DataConfig) -> Iterator[None]:
    """Translate megatron-core's errors about data files, and silence its log."""
    logger = logging.getLogger("megatron.core.datasets")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        # megatron-core wraps an error in writing the index of sequences.
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise OutputError(
            f"{cause.filename or data.cache or data.path[0]}: {cause.strerror or cause}. The index "
            "of samples is kept in the folder of the data, or in data.cache=DIR."
        ) from error
    finally:
        logger.setLevel(before)


class MicroBatches:
    """Micro-batches of this process, in order, from step ``begin`` (from 1).

    Step n takes ``global_batch_size`` sequences from number (n - 1) * global_batch_size on; its
    micro-batches are dealt round-robin to the data-parallel ranks, or its sequences, for those of
    OLMo-core. So the position in the data follows from the step alone.
    """

    def __init__(self, dataset: Any, train: StepsConfig, workers: int, begin: int = 1) -> None:
        self._loader = DataLoader(
            dataset,
            batch_sampler=_Sampler(len(dataset), train, begin, isinstance(dataset, MixSequences)),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the default one would change dropout's numbers
        )

    def __iter__(self) -> Iterator[Batch]:
        with sheltered():
            return iter(self._loader)


@dataclass(frozen=True)
class _Sampler:
    """Numbers of the sequences in each micro-batch of this process."""

    samples: int
    train: StepsConfig
    begin: int
    as_olmo_core: bool

    def __iter__(self) -> Iterator[list[int]]:
        ranks = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        for step in range((self.begin - 1) * batch, self.samples - batch + 1, batch):
            if self.as_olmo_core:
                own = range(step + rank, step + batch, ranks)
                yield from (list(own[i : i + micro]) for i in range(0, len(own), micro))
                continue
            for first in range(step + rank * micro, step + batch, ranks * micro):
                yield list(range(first, first + micro))
