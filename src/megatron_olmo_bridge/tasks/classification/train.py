"""Fine-tune a classifier, and keep its best weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, ReadOptions
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.nn.problem_types import REGRESSION
from megatron_olmo_bridge.runtime.process_groups import gather, on_first, started_together
from megatron_olmo_bridge.storage.atomic import replacing_folder
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.training.card import write_card
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.loop import Run, save_weights, train_loop
from megatron_olmo_bridge.training.monitor.human import spoken
from megatron_olmo_bridge.training.resolve import ResolvedRun, resolve
from megatron_olmo_bridge.training.setup import started

from .data import Examples, Tokenized, class_weights, load_examples, tokenize
from .problems import Problem, head_labels, problem_of
from .stopping import HISTORY, Evaluation, best, out_of_patience, read_history, write_history
from .task import Classification

CLASSIFIER, TOKENIZER = "classifier", "tokenizer"
"""Folders in the run's folder: the best weights as a Hugging Face checkpoint, and the tokenizer,
which is copied to every checkpoint."""


def train(config: TrainingConfig, say: Callable[[str], None]) -> dict[str, float]:
    """Fine-tune as ``config.classification`` says; every process of the layout calls it.

    The run's folder gets ``classifier/``, the best weights as a Hugging Face checkpoint that
    ``pipeline("text-classification")`` serves.

    Returns:
        Figures of the last step, and the best score with its step: ``best_macro_f1`` (``best_r2``
        of a regression) and ``best_step``.

    Raises:
        TrainingStopped: training ended before the last step; the message says why.
        BridgeError: the config is invalid, or a file that it names is missing or damaged.
    """
    classifier = Classifier.open(config)
    with started(classifier.resolved, classifier.task, say) as run:
        is_first = dist.get_rank() == 0
        if is_first:
            for line in classifier.describe_data():
                say(line)
        history = classifier.keep_best_weights(run, say)
        train_loop(run)
        top, score = best(history), classifier.problem.score
        figures = run.figures | {f"best_{score}": top.score, "best_step": top.step}
        if is_first:
            say(f">> best: {spoken(score)} {top.score:.4f} at step {top.step}")
            classifier.write_card(figures)
        return figures


@dataclass(frozen=True)
class Classifier:
    """A classifier to be trained: the resolved run, its data and its tokenizer."""

    resolved: ResolvedRun
    training: Examples
    held_out: Examples
    tokens: tuple[Tokenized, Tokenized]
    tokenizer: Any
    weights: torch.Tensor | None
    """Class weights of a single-label loss, [classes], float32."""

    @classmethod
    def open(cls, config: TrainingConfig) -> Classifier:
        """Read data, checkpoint headers and tokenizer.

        Raises:
            BridgeError: a file is missing or damaged.
        """
        if config.classification is None:
            raise InputError("the recipe has no section classification")
        if config.optimizer.z_loss:
            raise InputError(
                f"optimizer.z_loss={config.optimizer.z_loss}: is for language models; set it to 0"
            )
        if config.checkpoint.save is None:
            raise InputError("checkpoint.save is not set: name a folder for the classifier")
        train, held_out = load_examples(config.classification)
        weights = class_weights(config.classification, train)
        config, source = with_head(config, train.classes)
        resolved = resolve(config, source, started_together())
        tokenizer = _tokenizer(config, source)
        first, second = (
            tokenize(examples, tokenizer, config.train.sequence_length, resolved.bridge.vocab_size)
            for examples in (train, held_out)
        )
        return cls(resolved, train, held_out, (first, second), tokenizer, weights)

    @property
    def config(self) -> TrainingConfig:
        return self.resolved.config

    @property
    def problem(self) -> Problem:
        assert self.config.classification is not None
        return problem_of(self.config.classification)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.config.folder is not None  # checked by open()
        return self.config.folder

    def describe_data(self) -> list[str]:
        """Return lines that describe the amount of data and how much is truncated."""
        train = self.config.train
        epochs = train.steps * train.global_batch_size / len(self.training)
        return [
            f">> {len(self.training):,} texts to train on, {epochs:.1f} times; "
            f"{len(self.held_out):,} held out; "
            f"{self.problem.describe(self.training.labels, self.training.classes)}",
            f">> cut to {train.sequence_length} tokens: {self.tokens[0].truncated:,} of the texts "
            f"to train on, {self.tokens[1].truncated:,} of those held out",
        ]

    def task(self, resolved: ResolvedRun) -> Classification:
        """Return the task; all processes call it, after the process groups are created."""
        on_first(self._save_tokenizer)
        history = gather(on_first(lambda: read_history(self.folder / HISTORY)))[0]
        return Classification(
            resolved.config,
            self.training.classes,
            *self.tokens,
            pad_token_id=resolved.bridge.hf_config["pad_token_id"],
            tokenizer_folder=self.folder / TOKENIZER,
            weights=self.weights,
            history=history or [],
        )

    def keep_best_weights(self, run: Run, say: Callable[[str], None]) -> list[Evaluation]:
        """Write ``classifier/`` after each evaluation with the best score so far.

        Returns:
            The history of evaluations, which grows during the run.
        """
        task, target = run.task, self.folder / CLASSIFIER
        assert isinstance(task, Classification)
        history = task.history
        history[:] = [e for e in history if e.step <= run.step]
        run.stopped_early = out_of_patience(history, task.patience)  # before it was resumed
        score = spoken(self.problem.score)

        def on_evaluated() -> None:
            is_best = best(history) is history[-1]
            if is_best:
                save_weights(run, target)
            on_first(lambda: write_history(self.folder / HISTORY, history))
            if is_best and dist.get_rank() == 0:
                say(f">> the best {score} so far: kept as {target}")

        task.on_evaluated = on_evaluated
        return history

    def write_card(self, figures: dict[str, float]) -> None:
        """Write the model card of ``classifier/``."""
        score = self.problem.score
        chosen = {
            f"{spoken(score)} on held-out texts": figures[f"best_{score}"],
            "chosen weights": f"those of step {figures['best_step']}",
        }
        write_card(self.folder / CLASSIFIER, self.config, figures, chosen)

    def _save_tokenizer(self) -> None:
        with replacing_folder(self.folder / TOKENIZER) as folder:
            self.tokenizer.save_pretrained(folder)


def with_head(
    config: TrainingConfig, classes: tuple[str, ...]
) -> tuple[TrainingConfig, Checkpoint]:
    """Return the config with its model filled in, and the checkpoint that the weights come from.

    Args:
        config: config with a section ``classification``.
        classes: names of the head's outputs.

    Raises:
        BridgeError: the checkpoint is missing or damaged, or is a classifier with other classes or
            another problem type.
    """
    assert config.classification is not None
    init, problem_type = config.init, config.classification.problem_type
    if not (init.hf or init.checkpoint):
        raise InputError("init.hf is not set: name the OLMo checkpoint to be fine-tuned")
    folder = fetch(init.hf, init.revision)[0] if init.hf else Path(init.checkpoint or "")
    source = open_checkpoint(folder)
    if source.bridge.num_labels is None:
        source = open_checkpoint(folder, ReadOptions(num_labels=len(classes)))
    else:
        _check_head(source, folder, problem_type, classes)
    hf = source.hf_config
    pad = config.provider.get("pad_token_id", hf.get("pad_token_id"))
    if type(pad) is not int or not 0 <= pad < source.bridge.vocab_size:
        raise InputError(
            f"{folder}: its config.json has no pad_token_id, which marks the end of a text "
            f"(found {pad!r}). Choose the tokenizer's padding token: "
            "provider.pad_token_id=ID"
        )
    hf = hf | head_labels(classes, problem_type) | {"pad_token_id": pad}
    bridge = bridge_for(hf, source.config_from)
    return replace(config, model=bridge.hf_config), replace(source, bridge=bridge)


def _check_head(
    source: Checkpoint, folder: AnyPath, problem_type: str, classes: tuple[str, ...]
) -> None:
    """Check that the checkpoint's classification head has the classes of the data.

    Raises:
        InputError: problem type or classes differ.
    """
    count = source.bridge.num_labels
    assert count is not None
    own = source.hf_config.get("problem_type") or (REGRESSION if count == 1 else None)
    if own not in (None, problem_type):
        raise InputError(
            f"{folder}: is a classifier of problem_type {own}, but "
            f"classification.problem_type is {problem_type}: set it to {own}, or name a language "
            "model as init.hf"
        )
    names = source.hf_config.get("id2label") or {}
    known = tuple(str(names.get(str(i))) for i in range(count))
    # The values of a regression have no names, so only their number must match.
    same = count == len(classes) if problem_type == REGRESSION else known == classes
    if not same:
        raise InputError(
            f"{folder}: is a classifier of other classes. It has {count} "
            f"({', '.join(known[:5])}...), the data has {len(classes)} "
            f"({', '.join(classes[:5])}...). Name its language model as init.hf."
        )


def _tokenizer(config: TrainingConfig, source: Checkpoint) -> Any:
    """Load ``data.tokenizer`` or the checkpoint's tokenizer, and set padding and truncation."""
    from transformers import AutoTokenizer

    named = config.data.tokenizer
    folder = fetch(named, None)[0] if named else source.artifacts_folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{folder}: no tokenizer that transformers can load. Put the tokenizer's files there, "
            "or name a folder or hub id that has them as data.tokenizer."
        ) from error
    pad = source.bridge.hf_config["pad_token_id"]
    token = tokenizer.convert_ids_to_tokens(pad) if pad < len(tokenizer) else None
    if token is None:
        raise InputError(
            f"{folder}: the tokenizer has no token {pad}, which is the model's pad_token_id, so it "
            "may be another model's. Name the model's own tokenizer as data.tokenizer."
        )
    tokenizer.pad_token = token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = config.train.sequence_length
    return tokenizer
