"""What the training loop is given, and how it scores: as transformers would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Olmo2Config, Olmo2ForSequenceClassification, PreTrainedTokenizerFast

pytest.importorskip("megatron.core")

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.tasks.classification.data import Examples, samples, tokenize
from megatron_olmo_bridge.tasks.classification.stopping import Evaluation
from megatron_olmo_bridge.tasks.classification.task import Classification
from megatron_olmo_bridge.training.config import (
    ClassificationConfig,
    StepsConfig,
    TrainingConfig,
)

LENGTH, PAD = 8, 1
WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMo-2 classifier, random also in its norms. Not to be changed."""
    torch.manual_seed(0)
    model = Olmo2ForSequenceClassification(
        Olmo2Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            pad_token_id=PAD,
            num_labels=3,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("classifier") / "hf"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def chunk(classifier: Path, one_process: None) -> Any:
    provider = AutoBridge.from_hf_pretrained(classifier).to_megatron_provider()
    return provider.provide_distributed_model(wrap_with_ddp=False)[0]


@pytest.fixture
def task(
    chunk: Any,
    train_examples: Examples,
    held_out_examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
) -> Classification:
    """Its process groups are those of the chunk."""
    config = TrainingConfig(
        train=StepsConfig(global_batch_size=8, micro_batch_size=4, sequence_length=LENGTH),
        classification=ClassificationConfig(patience=2),
    )
    tokens = [tokenize(e, tokenizer, LENGTH, 32) for e in (train_examples, held_out_examples)]
    return Classification(config, train_examples.classes, *tokens, PAD, WEIGHTS)


def test_steps_go_on_where_they_were(task: Classification) -> None:
    """Micro-batches of the third step: asked for from the start, and asked for alone."""
    from_start = task.train_batches(1)
    for _ in range(4):
        next(from_start)
    alone = task.train_batches(3)
    for first in (16, 20):
        one, other = next(from_start), next(alone)
        assert torch.equal(one["tokens"], other["tokens"])
        rows = samples(task.config.train.seed, len(task.training), first, 4)
        assert one["labels"].tolist() == task.training.labels[rows].tolist()
        assert one["tokens"].shape == (4, LENGTH)  # a multiple of 8, of which there is just one


def test_all_held_out_texts_are_scored_once(task: Classification) -> None:
    batches = list(task.validation_batches())
    assert len(batches) == task.validation_micro_batches == 7  # 25 texts by fours
    labels, counted = (torch.cat([batch[n] for batch in batches]) for n in ("labels", "counted"))
    assert labels[:25].tolist() == task.held_out.labels.tolist()
    assert counted.tolist() == [True] * 25 + [False] * 3


def test_scores_are_those_of_transformers(
    task: Classification, chunk: Any, classifier: Path
) -> None:
    """Also of the batch that is filled up, and of texts that were cut."""
    model = Olmo2ForSequenceClassification.from_pretrained(classifier).eval()
    assert task.held_out.truncated > 0
    sums = []
    for batch in task.validation_batches():
        with torch.no_grad():
            output, score = task.forward(chunk, batch)
            loss, found = score(output)
            mask = (batch["tokens"] != PAD).long()
            logits = model(batch["tokens"], attention_mask=mask).logits
        assert (output - logits).abs().max() < 1e-5 * logits.abs().max()
        kept = batch["counted"]
        expected = cross_entropy(
            logits[kept], batch["labels"][kept], weight=WEIGHTS, reduction="none"
        )
        assert found["loss"] == pytest.approx(expected.sum().item(), rel=1e-4)
        assert loss == pytest.approx(expected.sum().item() / 4, rel=1e-4)
        assert found["weight"] == kept.sum()
        right = (logits.argmax(-1) == batch["labels"])[kept].sum()
        assert found["confusion"].view(3, 3).diagonal().sum() == right
        sums.append(found)
    totals = {name: sum(each[name].double() for each in sums) for name in sums[0]}
    figures, stop = task.evaluated(10, totals)
    assert totals["confusion"].sum() == totals["weight"] == 25
    right = totals["confusion"].view(3, 3).diagonal().sum().item()
    assert figures["accuracy"] == pytest.approx(right / 25)
    assert not stop


def sums_with(right: int) -> dict[str, torch.Tensor]:
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    matrix[0, 0] = matrix[1, 1] = matrix[2, 2] = right
    matrix[0, 1] = matrix[1, 2] = matrix[2, 0] = 10 - right
    return {"loss": torch.tensor(3.0), "weight": torch.tensor(30.0), "confusion": matrix.flatten()}


def test_it_asks_to_stop_when_patience_is_at_its_end(task: Classification) -> None:
    called: list[float] = []
    task.on_evaluated = lambda: called.append(task.history[-1].score)
    stops = [
        task.evaluated(step, sums_with(right))[1]
        for step, right in ((10, 5), (20, 7), (30, 6), (40, 7))
    ]
    assert stops == [False, False, False, True]
    assert called == pytest.approx([0.5, 0.7, 0.6, 0.7])


def test_a_resumed_run_evaluates_a_step_again_and_not_twice(task: Classification) -> None:
    task.history = [Evaluation(10, 0.5), Evaluation(20, 0.7), Evaluation(30, 0.6)]
    task.evaluated(20, sums_with(7))
    assert task.history == [Evaluation(10, 0.5), Evaluation(20, pytest.approx(0.7))]
