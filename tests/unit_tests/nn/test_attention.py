"""Attention without a matrix of scores: what megatron-core's own attention computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.nn.attention import ScaledDotProductAttention
from megatron_olmo_bridge.runtime.cpu import cpu_runtime

SEQUENCE, BATCH, HEADS, HEAD_DIM = 7, 3, 4, 8
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with cpu_runtime():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.manual_seed(0)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def config(groups: int = HEADS, **changes: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        **{"attention_dropout": 0.0, **changes},
    )


def both(
    settings: TransformerConfig, **arguments: Any
) -> tuple[ScaledDotProductAttention, DotProductAttention]:
    """Ours and megatron-core's, made by the same call."""
    return tuple(
        attention(
            config=settings,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            **arguments,
        )
        for attention in (ScaledDotProductAttention, DotProductAttention)
    )


def random_qkv(groups: int = HEADS, keys: int = SEQUENCE) -> list[torch.Tensor]:
    queries = torch.randn(SEQUENCE, BATCH, HEADS, HEAD_DIM)
    return [queries, *torch.randn(2, keys, BATCH, groups, HEAD_DIM)]


def outputs_and_gradients(
    module: torch.nn.Module, qkv: list[torch.Tensor], mask: torch.Tensor | None
) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in qkv]
    output = module(*inputs, mask, attn_mask_type=AttnMaskType.causal)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weight).sum().backward()
    return [output.detach(), *(x.grad for x in inputs)]


def assert_same(
    settings: TransformerConfig, qkv: list[torch.Tensor], mask: torch.Tensor | None, **more: Any
) -> torch.Tensor:
    ours, theirs = (outputs_and_gradients(m, qkv, mask) for m in both(settings, **more))
    assert ours[0].shape == (SEQUENCE, BATCH, HEADS * HEAD_DIM)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, **NEAR)
    return ours[0]


# -------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_causal_attention_is_megatrons(groups: int) -> None:
    qkv = random_qkv(groups)
    output = assert_same(config(groups), qkv, mask=None)
    # Causal: the first position sees itself alone.
    first = qkv[2][0].repeat_interleave(HEADS // groups, dim=1)
    torch.testing.assert_close(output[0], first.flatten(1), **NEAR)


@pytest.mark.parametrize("groups", [HEADS, 2])
def test_a_given_mask_says_where_not_to_look(groups: int) -> None:
    causal = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    qkv = random_qkv(groups)
    by_mask = assert_same(config(groups), qkv, causal[None, None])
    torch.testing.assert_close(by_mask, assert_same(config(groups), qkv, None), **NEAR)

    # Another for each sequence, and not causal: nobody looks at the last position of the second.
    mask = torch.zeros(BATCH, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
    mask[1, ..., -1] = True
    masked = assert_same(config(groups), qkv, mask)
    qkv[2][-1] += 100
    moved = assert_same(config(groups), qkv, mask)
    torch.testing.assert_close(moved[:, 1], masked[:, 1], **NEAR)
    assert (moved[:, 0] - masked[:, 0]).abs().max() > 1


def test_a_given_scale_takes_the_place_of_the_heads_width() -> None:
    qkv = random_qkv()
    plain = assert_same(config(), qkv, None)
    scaled = assert_same(config(), qkv, None, softmax_scale=0.9)
    assert (plain - scaled).abs().max() > 0.01
    by_default = assert_same(config(), qkv, None, softmax_scale=1 / math.sqrt(HEAD_DIM))
    torch.testing.assert_close(by_default, plain, **NEAR)


@pytest.mark.parametrize("window", [1, 3, SEQUENCE, SEQUENCE + 5])
@pytest.mark.parametrize("new", [1, 3, SEQUENCE])
def test_a_window_is_a_mask_also_with_cached_keys(window: int, new: int) -> None:
    """A window of ``window`` tokens including the query's own, in every second layer."""
    query, key, value = random_qkv()
    settings = config(window_size=(window - 1, 0), window_attn_skip_freq=2)
    positions = torch.arange(SEQUENCE)
    apart = positions[:, None] - positions
    hidden = (apart < 0) | (apart >= window)
    plain = both(config())[0]
    expected = plain(query, key, value, hidden[None, None])
    windowed = ScaledDotProductAttention(settings, layer_number=1)
    torch.testing.assert_close(windowed(query[-new:], key, value, None), expected[-new:], **NEAR)
    # The second layer has no window.
    full = ScaledDotProductAttention(settings, layer_number=2)
    torch.testing.assert_close(full(query, key, value, None), plain(query, key, value, None))


def test_a_window_and_a_mask_both_hide() -> None:
    query, key, value = random_qkv()
    hidden = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    hidden[2:, 1] = True
    settings = config(window_size=(2, 0))
    found = ScaledDotProductAttention(settings)(query, key, value, hidden[None, None])
    narrow = hidden | ~torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(-2)
    expected = both(config())[0](query, key, value, narrow[None, None])
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("new", [1, 3, SEQUENCE])
def test_with_cached_keys_the_queries_are_the_last_ones(groups: int, new: int) -> None:
    query, key, value = random_qkv(groups)
    attention = both(config(groups))[0]
    whole = attention(query, key, value, None)
    last = attention(query[-new:], key, value, None)
    torch.testing.assert_close(last, whole[-new:], **NEAR)


def test_bfloat16_stays_bfloat16() -> None:
    qkv = [x.bfloat16() for x in random_qkv(2)]
    output = both(config(2))[0](*qkv, None)
    assert output.dtype is torch.bfloat16
    exact = both(config(2))[0](*(x.float() for x in qkv), None)
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)


def test_it_has_nothing_that_a_checkpoint_holds() -> None:
    assert not both(config())[0].state_dict()


# ----------------------------------------------------------------------------------------- dropout


def test_dropout_follows_megatrons_random_numbers() -> None:
    attention, qkv = both(config(attention_dropout=0.5))[0], random_qkv()
    undropped = both(config())[0](*qkv, None)

    def drawn(seed: int) -> torch.Tensor:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        return attention(*qkv, None)

    first = drawn(5)
    assert (first - undropped).abs().max() > 0.1
    assert torch.equal(drawn(5), first)
    assert not torch.equal(drawn(6), first)
    assert not torch.equal(attention(*qkv, None), attention(*qkv, None))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_draws_where_megatrons_own_does(sequence_parallel: bool) -> None:
    # From the tensor-parallel ranks' own numbers, so that their heads drop different places; but
    # under sequence parallelism these are the default ones already.
    settings = config(attention_dropout=0.5)
    settings.sequence_parallel = sequence_parallel
    attention, qkv = ScaledDotProductAttention(settings), random_qkv()

    def default_states() -> list[torch.Tensor]:
        before = torch.get_rng_state()
        attention(*qkv, None)
        return [before, torch.get_rng_state()]

    assert torch.equal(*default_states()) is not sequence_parallel


def test_no_dropout_in_evaluation() -> None:
    qkv = random_qkv()
    attention = both(config(attention_dropout=0.5))[0].eval()
    assert torch.equal(attention(*qkv, None), both(config())[0](*qkv, None))


def test_the_layer_may_ask_for_another_dropout_than_the_config() -> None:
    qkv = random_qkv()
    undropped = both(config(attention_dropout=0.5), attention_dropout=0.0)[0]
    assert torch.equal(undropped(*qkv, None), both(config())[0](*qkv, None))


# -------------------------------------------------------------------------------- what it does not


def test_context_parallelism_is_refused() -> None:
    settings = config()
    settings.context_parallel_size = 2
    with pytest.raises(UnsupportedError, match=r"^context parallelism needs Transformer Engine"):
        ScaledDotProductAttention(settings)


@pytest.mark.parametrize("what", ["packed_seq_params", "attention_bias"])
def test_packed_sequences_and_biases_are_refused(what: str) -> None:
    attention = both(config())[0]
    with pytest.raises(UnsupportedError, match=r"^packed sequences and attention biases need"):
        attention(*random_qkv(), None, **{what: torch.zeros(1)})


def test_another_softmax_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="softmax_type"):
        ScaledDotProductAttention(config(softmax_type="learnable"))
