"""Where a sequence ends, what its padding may see, and the loss of a live model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForSequenceClassification

pytest.importorskip("megatron.core")

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.classification import last_tokens, padding_mask

PAD = 9


@pytest.mark.parametrize(
    ("tokens", "last"),
    [
        ([1, 2, 3, 4], 3),
        ([1, 2, PAD, PAD], 1),  # padded right
        ([PAD, PAD, 1, 2], 3),  # padded left
        ([1, PAD, 2, PAD], 2),  # a token in the middle that looks like padding
        ([PAD, PAD, PAD, PAD], 0),  # nothing else: as in transformers
    ],
)
def test_the_last_token_that_is_not_padding(tokens: list[int], last: int) -> None:
    others = [5, 6, 7, 8]
    assert last_tokens(torch.tensor([tokens, others]), PAD).tolist() == [last, 3]


def test_without_a_pad_token_one_sequence_ends_at_its_end_and_several_are_refused() -> None:
    assert last_tokens(torch.tensor([[1, 2, PAD]]), None).tolist() == [2]
    with pytest.raises(InputError, match="needs pad_token_id"):
        last_tokens(torch.tensor([[1, 2], [3, 4]]), None)


def test_padding_is_seen_by_itself_alone() -> None:
    mask = padding_mask(torch.tensor([[PAD, 1, 2], [1, 2, PAD]]), PAD)
    assert mask.shape == (2, 1, 3, 3)
    seen = (~mask[:, 0]).int().tolist()
    assert seen[0] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert seen[1] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([2, 0])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        ("regression", torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.25]])),
    ],
)
def test_a_live_model_in_bfloat16_has_the_loss_of_transformers(
    problem_type: str, labels: torch.Tensor, tmp_path: Path, one_process: None
) -> None:
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=PAD,
        num_labels=3,
        problem_type=problem_type,
    )
    reference = Olmo2ForSequenceClassification(config).to(torch.bfloat16)
    torch.nn.init.normal_(reference.score.weight, std=0.5)
    reference.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, PAD, PAD]])
    expected = reference(
        tokens,
        attention_mask=(tokens != PAD).long(),
        labels=labels.to(torch.bfloat16) if labels.is_floating_point() else labels,
    ).loss
    expected.backward()

    provider = AutoBridge.from_hf_pretrained(tmp_path).to_megatron_provider()
    (chunk,) = provider.provide_distributed_model(wrap_with_ddp=False)
    losses = chunk(tokens, torch.arange(4).expand_as(tokens), None, labels=labels)
    losses.mean().backward()
    assert losses.shape == (2,)
    assert losses.mean().item() == pytest.approx(expected.item(), rel=2e-2)
    gradient, right = chunk.module.score.weight.grad, reference.score.weight.grad
    assert (gradient - right).norm() < 2e-2 * right.norm()


def test_a_problem_type_that_the_head_cannot_have_is_refused(one_process: None) -> None:
    provider = AutoBridge.from_hf_config(
        Olmo2Config(num_hidden_layers=1, architectures=["Olmo2ForCausalLM"]).to_dict()
    ).to_megatron_provider(load_weights=False)
    provider.problem_type = "regression"
    with pytest.raises(InputError, match="no classification head"):
        provider.finalize()
