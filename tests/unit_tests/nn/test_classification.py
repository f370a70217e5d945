"""Where a sequence ends, and what its padding may see."""

import pytest
import torch

pytest.importorskip("megatron.core")

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
