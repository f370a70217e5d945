"""Language modelling: predict the next token, at every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.megatron import MegatronCheckpoint
from megatron_olmo_bridge.checkpoints.olmo_core import OLMoCoreCheckpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.data.info import DataInfo, read_info
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import here
from megatron_olmo_bridge.nn.cross_entropy import vocab_parallel_cross_entropy
from megatron_olmo_bridge.runtime.process_groups import started_together
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.loop import train_loop
from megatron_olmo_bridge.training.monitor.records import NATS_PER_TOKEN
from megatron_olmo_bridge.training.olmo_core_run import check_position, continued
from megatron_olmo_bridge.training.recipes import OVERRIDDEN
from megatron_olmo_bridge.training.resolve import ResolvedRun, resolve
from megatron_olmo_bridge.training.setup import started
from megatron_olmo_bridge.training.task import Score, Sums, Task
from megatron_olmo_bridge.training.token_data import (
    IGNORED,
    Batch,
    MicroBatches,
    MixSequences,
    TokenData,
    check_data,
)


def train(config: TrainingConfig, say: Callable[[str], None]) -> dict[str, float]:
    """Train a language model; see :func:`megatron_olmo_bridge.train`."""
    resolved = resolve(*with_model(config), started_together())
    with started(resolved, LanguageModelling.open, say) as run:
        train_loop(run)
        return run.figures


def with_model(config: TrainingConfig) -> tuple[TrainingConfig, Checkpoint | None]:
    """Return the config with its model filled in, and the checkpoint that the weights come from.

    Raises:
        BridgeError: the checkpoint is missing or damaged, or the data was made for another model.
    """
    init = config.init
    if not (init.hf or init.checkpoint):
        return _with_end_of_data(config), None
    for key, origin in config.sources.items():
        if key.startswith("model.") and origin == OVERRIDDEN:
            raise InputError(
                f"{key}: can't be set, as the model comes from init.hf or init.checkpoint"
            )
    folder = fetch(init.hf, init.revision)[0] if init.hf else init.checkpoint
    source = open_checkpoint(folder or "")
    if init.optimizer and not isinstance(source, MegatronCheckpoint | OLMoCoreCheckpoint):
        raise InputError(
            f"{folder}: no optimizer state is read from {source.kind} checkpoints; leave out "
            "init.optimizer"
        )
    if init.optimizer and isinstance(source, OLMoCoreCheckpoint):
        config = continued(config, source, source.optimizer_state)
    return replace(config, model=source.bridge.hf_config), source


def _with_end_of_data(config: TrainingConfig) -> TrainingConfig:
    """Set a new model's ``eos_token_id`` to the token that ends the documents of its data.

    Without it, generation would not stop at the end of a text.

    Raises:
        InputError: the model's config has a different ``eos_token_id``.
    """
    if not config.data.path:
        return config
    name, end_of_data = "eos_token_id", read_info(Path(config.data.path[0])).eos_id
    end_of_model = config.model.get(name)
    if end_of_data is None or end_of_data == end_of_model:
        return config
    if end_of_model is not None:
        raise InputError(
            f"the documents of {config.data.path[0]} end with token {end_of_data}, but the model's "
            f"{name} is {end_of_model}: prepare them with the model's tokenizer, or set "
            f"model.{name}={end_of_data}"
        )
    return replace(config, model=config.model | {name: end_of_data})


@dataclass
class LanguageModelling(Task):
    """Language modelling on prepared tokens."""

    config: TrainingConfig
    data: TokenData
    tokenizer_folder: Path | None
    vocab_size: int
    micro_batches: int
    """Number of micro-batches of this process per step."""
    loss_unit: str = NATS_PER_TOKEN

    @classmethod
    def open(cls, resolved: ResolvedRun) -> LanguageModelling:
        """Open the data; all processes call it, after the process groups are created."""
        config, vocab_size = resolved.config, resolved.bridge.vocab_size
        data = TokenData.open(config, vocab_size)
        source = resolved.source
        if (
            isinstance(source, OLMoCoreCheckpoint)
            and isinstance(data.train, MixSequences)
            and config.init.step
        ):
            check_position(source, data.train.trainer_state(config.init.step)["data_loader"])
        folder = _tokenizer_folder(config, resolved.source, data.info)
        return cls(config, data, folder, vocab_size, resolved.layout.micro_batches)

    def train_batches(self, begin: int) -> Iterator[Batch]:
        train = self.config.train
        return iter(MicroBatches(self.data.train, train, self.config.data.workers, begin))

    def validation_batches(self) -> Iterator[Batch] | None:
        if self.data.validation is None:
            return None
        return iter(MicroBatches(self.data.validation, self.config.train, 0))

    @property
    def validation_micro_batches(self) -> int:
        return self.config.evaluation.batches * self.micro_batches

    def trainer_state(self, step: int) -> dict[str, Any] | None:
        sequences = self.data.train
        if not isinstance(sequences, MixSequences):
            return None
        return sequences.trainer_state(step)

    def forward(self, chunk: Any, batch: Batch) -> tuple[torch.Tensor, Score]:
        _check_tokens(batch, self.vocab_size)
        device = torch.cuda.current_device()
        tokens, labels, positions = (
            batch[name].to(device, non_blocking=True)
            for name in ("tokens", "labels", "position_ids")
        )
        unwrap_model(chunk).compute_language_model_loss = self._losses
        output = chunk(tokens, positions, None, labels=labels)

        def score(losses: torch.Tensor) -> tuple[torch.Tensor, Sums]:
            loss, log_sum_exp = losses
            z_loss = self.config.optimizer.z_loss * log_sum_exp.square()
            targets = loss.numel()
            if self.config.data.mix:  # OLMo-core counts a sequence that it doesn't learn from too
                learned = (labels != IGNORED).T
                loss, z_loss = loss * learned, z_loss * learned
                targets -= labels.shape[0]
            return (loss + z_loss).sum() / targets, {
                "loss": loss.detach().sum(),
                "z_loss": z_loss.detach().sum(),
                "weight": loss.new_full((), targets),
            }

        return output, score

    def _losses(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Replace GPTModel's own loss: return cross entropy and log-sum-exp, [2, s, b].

        Args:
            labels: [b, s]. Without labels GPTModel would copy the logits to return them.
            logits: [s, b, padded vocabulary / TP].
        """
        targets = labels.T.clamp_min(0)  # what the ignored ones give is not counted
        return torch.stack(vocab_parallel_cross_entropy(logits, targets, self.vocab_size))

    def evaluated(self, step: int, sums: Sums) -> tuple[dict[str, float], bool]:
        return {"loss": float(sums["loss"] / sums["weight"])}, False


def check_prepared(resolved: ResolvedRun) -> None:
    """Check data and tokenizer as the run would, without opening the data.

    Raises:
        BridgeError: as :func:`check_data`, or ``data.tokenizer`` does not exist.
    """
    config = resolved.config
    info = check_data(config, resolved.bridge.vocab_size)
    _tokenizer_folder(config, resolved.source, info)


def _tokenizer_folder(
    config: TrainingConfig, source: Checkpoint | None, prepared: list[DataInfo]
) -> Path | None:
    """Return the folder with the tokenizer files, which are copied to every checkpoint and export.

    Raises:
        InputError: ``data.tokenizer`` does not exist, or is a file.
    """
    if config.data.tokenizer is None and source is not None and source.artifacts_folder is not None:
        return here(source.artifacts_folder)
    named = config.data.tokenizer or (prepared[0].tokenizer if prepared else None)
    if named is None or Path(named).is_dir():
        return Path(named) if named else None
    if Path(named).is_file():
        raise InputError(f"data.tokenizer={named}: is a file; name the tokenizer's folder")
    if config.data.tokenizer is None:
        return None  # the data was prepared on another machine, which has the tokenizer
    return here(fetch(named, None)[0])


def _check_tokens(batch: Batch, vocab_size: int) -> None:
    """Check that each token has an embedding; else a GPU would only report a failed assertion.

    Raises:
        InputError: a token is outside the vocabulary.
    """
    for name in ("tokens", "labels"):
        least, most = (int(token) for token in batch[name].aminmax())
        if least < (IGNORED if name == "labels" else 0) or most >= vocab_size:
            raise InputError(
                f"the data has token {least if least < 0 else most}, the model has {vocab_size} "
                "tokens: the data was prepared with another tokenizer. Prepare it with the "
                "model's, or set model.vocab_size."
            )
