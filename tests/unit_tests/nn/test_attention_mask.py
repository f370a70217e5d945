"""Which masks are plain causality, and which are no masks of a decoder."""

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.attention_mask import check_mask, is_causal


def causal(queries: int, keys: int, batch: int = 1) -> torch.Tensor:
    positions = torch.arange(keys)
    return (positions[-queries:, None] < positions).expand(batch, 1, queries, keys).clone()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (2, 5), (1, 5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_hiding_exactly_the_later_keys_is_causal(queries: int, keys: int, batch: int) -> None:
    assert is_causal(causal(queries, keys, batch))
    for change in range(keys):
        mask = causal(queries, keys, batch)
        mask[-1, 0, -1, change] ^= True
        assert not is_causal(mask)


def test_a_mask_that_was_changed_in_place_is_looked_at_again() -> None:
    mask = causal(4, 4)
    assert is_causal(mask)
    mask[0, 0, 3, 0] = True
    assert not is_causal(mask)


def test_a_mask_in_the_memory_of_another_is_looked_at_again() -> None:
    for start in (0, 1):
        mask = causal(4, 4)
        mask[0, 0, 3, 0] = bool(start)
        assert is_causal(mask) == (not start)
        del mask


def test_masks_of_inference_mode_are_masks_too() -> None:
    with torch.inference_mode():
        assert is_causal(causal(3, 3))
        assert not is_causal(~causal(3, 3))


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (2, 1, 3, 5), (2, 8, 3, 5)])
def test_masks_of_all_queries_and_keys_are_taken(shape: tuple[int, ...]) -> None:
    check_mask(torch.zeros(shape, dtype=torch.bool), 3, 5)


@pytest.mark.parametrize("shape", [(2, 5), (3, 5), (2, 3, 5), (2, 1, 1, 5), (2, 1, 3, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"attention_mask is bool .* \[batch or 1, 1, 3, 5\]"):
        check_mask(torch.zeros(shape, dtype=torch.bool), 3, 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="True where a query must not see a key"):
        check_mask(torch.ones(1, 1, 3, 5, dtype=dtype), 3, 5)
